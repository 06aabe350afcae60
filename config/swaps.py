# State tracking: objects trade places in words, "swap 1 3, 3 2: what color is number 2?". Every swap is one
# more step to follow. Four passes, the default. The data:
# python data.py shapes --out=data/swaps --types=swaps --min_objects=4 --max_objects=4 \
#     --max_swaps=6 --train_swaps=3 --describe=0 --asked=1
out_dir = 'out/swaps'
dataset = 'data/swaps'
max_steps = 3000
learning_rate = 1e-3  # 2e-3, right for the shapes, is too high for n=2 and n=8 here (results/rates.md)
norm = 'pre'                          # as in the runs of results/
qk_norm = False
recall = False
