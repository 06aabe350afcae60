# The TRM of config/trm.py, trained up to ten times as long: at most an hour on two CPU cores.
out_dir = 'out/trm_long'
max_steps = 12000
eval_interval = 1000
