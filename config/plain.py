# The baseline: a plain decoder of four blocks (twice the core parameters of config/trm.py), everything else the same.
out_dir = 'out/plain'
kind = 'plain'
n_layer = 4
