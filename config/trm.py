# The main job: a TRM, two blocks that recur twice on [y ; z], answers questions about drawn pictures. Of what
# fits into its minutes, two passes did best on validation: four are slower, and learn less in the same time
# (results/minutes.md).
out_dir = 'out/trm'
inner_steps = 2
max_steps = 2400
eval_interval = 400
