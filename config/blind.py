# The control: the TRM of config/trm.py without the picture. What it gets right can be guessed from the
# question.
out_dir = 'out/blind'
inner_steps = 2
recall = False
n_kv_head = 1
max_steps = 2600
eval_interval = 650
use_vision = False
