# The main job: a TRM, two blocks that recur on [y ; z], answers questions about drawn pictures. Passes are
# drawn anew for every training step, so afterwards any number of them works (results/depth.md).
out_dir = 'out/trm'
min_inner_steps = 1                   # three training steps in four have one pass, the mean is 1.5
inner_steps = 8
n_kv_head = 1                         # heads share keys and values, which saves a sixth of a step
max_steps = 2800
eval_interval = 700
