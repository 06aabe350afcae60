# Sort-of-CLEVR with the encoder trained along, starting from the shipped one, on a quarter of the rows of
# config/sortofclevr.py. At the decoder's learning rate the encoder forgets where things are, so it has a
# twentieth of it.
out_dir = 'out/sortofclevr_encoder'
dataset = 'data/sortofclevr'
inner_steps = 2
train_encoder = True
encoder_lr = 0.05
max_steps = 3000
eval_interval = 300
batch_size = 64
norm = 'pre'                          # as in the runs of results/
qk_norm = False
recall = False
