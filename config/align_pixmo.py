# Stage 1 at full scale: behind a frozen CLIP, a Perceiver and a Matryoshka projection learn from the
# captions of PixMo what a decoder may ask. Shapes, prefixes and batch are Edge-Glass'
# (perceiver_mrl_alignment.yaml), which tried learning rates of 2e-4 and 2e-3 and stayed at chance with the
# latter; the run says so if that happens here. A text tower of our own, trained along, takes the place of a
# pretrained one.
out_dir = 'out/align_pixmo'
captions = 'dataset'
dataset = 'data/pixmo_cap'  # a row a picture, with its caption: 14,000 / 3,000 / 3,000 in Edge-Glass
trunk = 'clip-vit-large-patch14-336'  # a folder from Hugging Face, OpenAI's .pt, or open_clip's file
fit = 'squash'                        # CLIP's own crop would cut off what a caption names at the sides
adapter = 'linear'
n_latents = 64
perceiver_layers = 4
perceiver_heads = 8
encoder_dim = 4096
prefixes = '512,768,1024,1536,2048,3072,4096'
text_width = 512
text_layers = 4
vocab_size = 8192
max_steps = 1090                      # ten times through 14,000 pictures
batch_size = 128
learning_rate = 2e-4
weight_decay = 0.01
optimizer = 'adamw'
eval_interval = 109
