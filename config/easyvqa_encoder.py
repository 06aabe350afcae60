# easy-VQA with the encoder trained along, starting from the shipped one: the upper bound for
# config/easyvqa.py.
out_dir = 'out/easyvqa_encoder'
dataset = 'data/easyvqa'
train_encoder = True
max_steps = 1000
batch_size = 64
learning_rate = 1e-3
norm = 'pre'                          # as in the runs of results/
qk_norm = False
recall = False
