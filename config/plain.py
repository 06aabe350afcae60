# The baseline: a plain decoder of four blocks, twice the core parameters of config/trm.py. A step of it
# costs twice the FLOPs, so it gets half the steps: both train with about the same FLOPs.
out_dir = 'out/plain'
kind = 'plain'
n_layer = 4
max_steps = 1200
norm = 'pre'                          # its numbers in results/ were made so
qk_norm = False                       # so too
