# State tracking: objects trade places in words, "swap 1 3, 3 2: what color is number 2?". Every swap is one
# more step to follow. Of three runs with drawn passes one followed three; with four, always, all do:
# --inner_steps=4 --min_inner_steps=None --max_steps=3000 --eval_interval=500 (results/depth.md). The data:
# python data.py shapes --out=data/swaps --types=swaps --n_train=24000 --min_objects=4 --max_objects=4 \
#     --max_swaps=6 --train_swaps=3 --describe=0 --asked=1
out_dir = 'out/swaps'
dataset = 'data/swaps'
min_inner_steps = 4                   # three training steps in four have 4 to 7 passes, the mean is 6.6
inner_steps = 16
recall = False                        # with it a third swap was not followed
max_steps = 2350
eval_interval = 470
learning_rate = 1e-3                  # 2e-3, right for the shapes, was too high here (results/rates.md)
