# Chains without shortcuts, "what color is east of north of the red circle?": only their start and every one of their steps decide the answer. The data:
# python data.py shapes --out=data/chains --chains=next --types=color,shape,place,at,hops --min_objects=4 --max_objects=4 --max_hops=4 --n_train=12000 --describe=0
# In 2,500 steps nothing learnt them yet (results/README.md).
out_dir = 'out/chains'
dataset = 'data/chains'
inner_steps = 4
max_steps = 12000
eval_interval = 500
