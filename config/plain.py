# The baseline: a plain decoder of four blocks, twice the core parameters of config/trm.py. A step of it takes about 1.15 times as long, so it
# gets fewer steps: both train for about the same time.
out_dir = 'out/plain'
kind = 'plain'
n_layer = 4
max_steps = 1200
