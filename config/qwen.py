# config/smollm2.py with Qwen2.5 of 494 million parameters, for a GPU of 24 GB.
out_dir = 'out/qwen'
decoder = 'Qwen/Qwen2.5-0.5B-Instruct'
kind = 'plain'
dataset = 'data/mosaics'
encoder = 'timm/tf_efficientnet_lite0'
fit = 'squash'
max_question_tokens = 48
batch_size = 64
max_steps = 1000
eval_interval = 250
optimizer = 'adamw'
learning_rate = 1e-3
decoder_lr = 0.1
weight_decay = 0.01
ema = 0
checkpoint_blocks = True
