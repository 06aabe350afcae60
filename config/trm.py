# The main job: a TRM, two blocks that recur four times on [y ; z], answers questions about drawn pictures.
# All its settings are the defaults. Of what fits into its minutes, four passes with the norms after each
# part of a block did best on validation: .944 over three seeds; two passes with the norms before it had
# .924 (results/).
out_dir = 'out/trm'
