# The baseline: a plain decoder of four blocks, with twice the parameters of config/trm.py but for the
# embeddings. A step of it costs twice the FLOPs, so it gets half the steps.
out_dir = 'out/plain'
kind = 'plain'
n_layer = 4
n_kv_head = 1
max_steps = 1300
eval_interval = 325
