# The TRM of config/trm.py, trained more than three times as long.
out_dir = 'out/trm_long'
max_steps = 12000
eval_interval = 1000
