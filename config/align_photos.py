# Stage 1 on hundreds of photographs of your own with captions: minutes on a CPU. With --trunk=CLIP_FOLDER, or
# timm/NAME, it starts from what that sees (--adapter=linear --perceiver_width=256 makes a wide one cheaper);
# without, a small encoder learns from these pictures alone. docs/photographs.md says what 778 gave.
out_dir = 'out/align_photos'
captions = 'dataset'
dataset = 'data/mine'
max_steps = 600
batch_size = 64  # or all pictures, where there are fewer
learning_rate = 5e-4
optimizer = 'adamw'
eval_interval = 50
