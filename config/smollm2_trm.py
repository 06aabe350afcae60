# After config/smollm2.py: its last blocks are passed again over the answer. At the start that changes nothing.
out_dir = 'out/smollm2_trm'
kind = 'trm'
recursion = 'loop'
recur_layers = 8
inner_steps = 2
