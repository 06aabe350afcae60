# The main job: a TRM, two blocks that recur on [y ; z], answers questions about drawn pictures. Passes are
# drawn anew for every training step, so afterwards any number of them works (results/depth.md).
out_dir = 'out/trm'
min_inner_steps = 1                   # a training step has one, two or three passes
inner_steps = 3
n_kv_head = 1                         # heads share keys and values, which saves a sixth of a step
max_steps = 2600
eval_interval = 650
