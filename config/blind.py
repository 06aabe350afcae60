# The control: the TRM of config/trm.py without the picture. What it gets right can be guessed from the
# question.
out_dir = 'out/blind'
min_inner_steps = 1
inner_steps = 8
n_kv_head = 1
max_steps = 2800
eval_interval = 700
use_vision = False
