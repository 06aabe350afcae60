# The control: the TRM of config/trm.py without the picture. What it gets right can be guessed from the
# question.
out_dir = 'out/blind'
use_vision = False
