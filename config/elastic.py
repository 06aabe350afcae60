# A TRM whose passes are drawn anew for every training step, so that afterwards any number of them works:
# python eval.py --out_dir=out/elastic --inner_steps=64 (results/depth.md). It has y alone: with z, captions
# are worse, and passes come to rest later.
out_dir = 'out/elastic'
recursion = 'loop'
n_kv_head = 1
min_inner_steps = 1                   # three training steps in four have one pass, the mean is 1.5
inner_steps = 8
max_steps = 3592
eval_interval = 898
