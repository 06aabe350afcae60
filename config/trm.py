# The main job: a TRM, two blocks that recur twice on [y ; z], answers questions about drawn pictures. Chosen
# on validation with 3,000 steps, then cut to 2,600 for time (results/minutes.md). config/elastic.py is its
# sister for any number of passes; captions are worse there.
out_dir = 'out/trm'
inner_steps = 2
recall = False                        # as it was measured
n_kv_head = 1                         # heads share keys and values, which saves a sixth of a step
max_steps = 2600
eval_interval = 650
