# Pictures and sounds in one context: python data.py sounds draws the dataset. The encoder of sounds is a
# small new one that is trained along. --use_vision=false is the blind control, --use_sound=false the deaf
# one.
out_dir = 'out/sounds'
dataset = 'data/sounds'
use_sound = True
inner_steps = 2
recall = False                        # these three as in the main job
n_kv_head = 1
max_steps = 2600
eval_interval = 650
