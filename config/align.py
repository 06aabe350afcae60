# Stage 1: aligns the small encoder with captions of drawn pictures. The file that it writes,
# out/align/encoder.pt, is shipped as assets/encoder_shapes.pt.
out_dir = 'out/align'
max_steps = 10000
batch_size = 64
learning_rate = 1.2e-3
min_lr_ratio = 0.03
optimizer = 'adamw'
beta2 = 0.98
ema = 0.998
eval_interval = 1000
