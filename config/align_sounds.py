# Stage 1 for sounds: a small encoder learns from captions of drawn melodies. The file that it writes,
# out/align_sounds/encoder.pt, is shipped as assets/encoder_sounds.pt.
out_dir = 'out/align_sounds'
reads = 'sound'
encoder_width = 64
encoder_layers = 1
max_steps = 2000
batch_size = 64
learning_rate = 2e-3
min_lr_ratio = 0.03
optimizer = 'adamw'
beta2 = 0.98
ema = 0.998
eval_interval = 500
