# A TRM of two passes, always, trained eight times as long as the main job on five times as many pictures,
# which ask for hops twice. The data: python data.py shapes --out=data/shapes_long --n_train=40000 \
#     --types=color,shape,exist,count,count,compare,relation,relation,hops,hops
out_dir = 'out/trm_long'
dataset = 'data/shapes_long'
inner_steps = 2
recall = False                        # its numbers in results/shapes.md were made so
n_kv_head = 1
max_steps = 20000
eval_interval = 2000
