# The main job: a TRM, two blocks that recur on [y ; z], answers questions about drawn pictures.
out_dir = 'out/trm'
