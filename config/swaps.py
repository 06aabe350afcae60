# State tracking: objects trade places in words, "swap 1 3, 3 2: what color is number 2?". Every swap is one
# more step to follow. Four passes, always, in the first half of the training steps, then draws: afterwards
# any number does from four on, python eval.py --out_dir=out/swaps --inner_steps=64 (results/depth.md). Data:
# python data.py shapes --out=data/swaps --types=swaps --n_train=24000 --min_objects=4 --max_objects=4 \
#     --max_swaps=6 --train_swaps=3 --describe=0 --asked=1
out_dir = 'out/swaps'
dataset = 'data/swaps'
min_inner_steps = 4                   # three draws in four are 4 to 7 passes, the mean is 6.6
inner_steps = 16
draw_after = 0.5                      # drawn from the start, one run of three followed three swaps
recall = False                        # with it a third swap was not followed
max_steps = 2630
eval_interval = 526
learning_rate = 1e-3                  # 2e-3, right for the shapes, was too high here (results/rates.md)
