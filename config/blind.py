# The control: the TRM of config/trm.py without the picture. What it gets right can be guessed from the question.
out_dir = 'out/blind'
inner_steps = 4
norm = 'post'
use_vision = False
