# Stage 1: aligns the small encoder with captions of drawn pictures. What it writes, out/align/encoder.pt, was
# shipped as assets/encoder_shapes.pt until config/align_wild.py went on from it.
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
