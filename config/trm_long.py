# The TRM of config/trm.py, trained two and a half times as long.
out_dir = 'out/trm_long'
max_steps = 9000
eval_interval = 1000
