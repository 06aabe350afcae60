# Stage 1, the second part: goes on from config/align.py with pictures most of which are in varied styles.
# From fresh weights nothing was learnt from those within 4,000 steps. The file that it writes,
# out/align_wild/encoder.pt, is shipped as assets/encoder_shapes.pt.
out_dir = 'out/align_wild'
init_from = 'out/align/encoder.pt'
variety = 0.7
max_steps = 12000
batch_size = 64
learning_rate = 1e-3
min_lr_ratio = 0.03
optimizer = 'adamw'
beta2 = 0.98
ema = 0.998
eval_interval = 1000
