# Stage 1 on hundreds of photographs of one's own with captions: minutes on a CPU. With --trunk=CLIP_FOLDER it
# starts from what CLIP sees; without, a small encoder learns from these pictures alone. It was tried on 234
# drawn pictures, not on photographs: rates of 2e-4 and 1e-3 both learnt, with CLIP and without.
out_dir = 'out/align_photos'
captions = 'dataset'
dataset = 'data/mine'
max_steps = 600
batch_size = 64  # or all pictures, where there are fewer
learning_rate = 5e-4
optimizer = 'adamw'
eval_interval = 50
