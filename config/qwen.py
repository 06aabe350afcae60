# After config/smollm2.py: Qwen2.5 with 494 million parameters, for a GPU of 24 GB.
out_dir = 'out/qwen'
decoder = 'Qwen/Qwen2.5-0.5B-Instruct'
batch_size = 64
dtype = 'bfloat16'                    # its products; the weights stay in float32
checkpoint_blocks = True
