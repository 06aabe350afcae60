# The control: the TRM of config/trm.py without the picture. What it gets right can be guessed from the
# question.
out_dir = 'out/blind'
inner_steps = 2
max_steps = 2800
eval_interval = 400
use_vision = False
