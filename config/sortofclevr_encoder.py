# Sort-of-CLEVR with the encoder trained along, starting from the shipped one: what config/sortofclevr.py loses by an encoder of other pictures.
out_dir = 'out/sortofclevr_encoder'
dataset = 'data/sortofclevr'
inner_steps = 2
train_encoder = True
batch_size = 64
learning_rate = 1e-3
