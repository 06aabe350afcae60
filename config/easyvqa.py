# easy-VQA (python data.py easyvqa --source=... --out=data/easyvqa) with the frozen shipped encoder, which
# has seen none of it. Alone it trains a TRM; after config/plain.py or config/blind.py it trains those: give
# --out_dir then.
out_dir = 'out/easyvqa'
dataset = 'data/easyvqa'
max_steps = 1000
norm = 'pre'                          # as in the runs of results/
qk_norm = False
recall = False
