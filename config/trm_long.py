# A TRM of four passes, with the norms before the blocks, trained five times as long as the one of
# config/trm.py.
out_dir = 'out/trm_long'
max_steps = 12000
eval_interval = 1000
norm = 'pre'                          # its numbers in results/ were made so
qk_norm = False                       # so too
