# easy-VQA (python data.py easyvqa --source=... --out=data/easyvqa) with the frozen shipped encoder, which
# has seen none of it. Alone it trains a TRM; after config/plain.py or config/blind.py it trains those: give
# --out_dir then.
out_dir = 'out/easyvqa'
dataset = 'data/easyvqa'
max_steps = 1000
norm = 'pre'                          # its numbers in results/ were made so
qk_norm = False                       # so too
