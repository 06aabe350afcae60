# The main job: a TRM, two blocks that recur on [y ; z], answers questions about drawn pictures. Two steps instead of four: they cost two thirds
# of the time, and what these questions lack is training steps rather than depth.
out_dir = 'out/trm'
inner_steps = 2
