# The main job: a TRM, two blocks that recur twice on [y ; z], answers questions about drawn pictures. Of what
# fits into its minutes this did best on validation: four passes learn less in the same time
# (results/minutes.md).
out_dir = 'out/trm'
inner_steps = 2
max_steps = 2800
eval_interval = 400
