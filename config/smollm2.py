# A pretrained language model as the decoder, SmolLM2 with 135 million parameters, learns to see: the mosaics
# of config/mosaics.py. --train_decoder=projection leaves its own weights as they are.
out_dir = 'out/smollm2'
decoder = 'HuggingFaceTB/SmolLM2-135M-Instruct'
kind = 'plain'
dataset = 'data/mosaics'
encoder = 'timm/tf_efficientnet_lite0'
fit = 'squash'
max_question_tokens = 48
batch_size = 32
max_steps = 1000
eval_interval = 250
optimizer = 'adamw'
learning_rate = 1e-3                  # of what is new
decoder_lr = 0.1                      # its own weights move a tenth as fast
weight_decay = 0.01
ema = 0                               # another copy of the weights would be judged
