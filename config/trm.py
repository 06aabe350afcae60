# The main job: a TRM, two blocks that recur twice on [y ; z], answers questions about drawn pictures. Of what
# fits into its minutes this did best on validation (results/minutes.md).
out_dir = 'out/trm'
inner_steps = 2
n_kv_head = 1                         # heads share keys and values, which saves a sixth of a step
max_steps = 2600
eval_interval = 650
