# Sort-of-CLEVR (python data.py sortofclevr) with the frozen shipped encoder, which has seen none of it: the
# pictures, 75 x 75, are squashed to its 64 x 64, and orange is none of its colours. Alone it trains a TRM;
# after config/plain.py or config/blind.py it trains those: give --out_dir then.
out_dir = 'out/sortofclevr'
dataset = 'data/sortofclevr'
inner_steps = 2
max_steps = 6000
eval_interval = 500
norm = 'pre'                          # as in the runs of results/
qk_norm = False
recall = False
