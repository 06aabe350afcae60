# Stage 1, the first part: aligns the small encoder with captions of drawn pictures. It writes
# out/align/encoder.pt, from which config/align_wild.py goes on.
out_dir = 'out/align'
variety = 0.0
max_steps = 8000
batch_size = 64
learning_rate = 1.2e-3
min_lr_ratio = 0.03
optimizer = 'adamw'
beta2 = 0.98
ema = 0.998
eval_interval = 1000
