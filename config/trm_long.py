# The TRM of config/trm.py, trained six times as long on five times as many pictures. The data:
# python data.py shapes --out=data/shapes_long --n_train=40000
out_dir = 'out/trm_long'
dataset = 'data/shapes_long'
inner_steps = 2
n_kv_head = 1
max_steps = 16000
eval_interval = 2000
