# State tracking: objects trade places in words, "swap 1 3, 3 2: what color is number 2?". Every swap is one
# more step to follow. Four passes, always, in the first half of the training steps, then draws. Afterwards
# any number from four on will do: python eval.py --out_dir=out/swaps --inner_steps=64 (results/depth.md). The
# data:
# python data.py shapes --out=data/swaps --types=swaps --n_train=24000 --min_objects=4 --max_objects=4 \
#     --max_swaps=6 --train_swaps=3 --describe=0 --asked=1
out_dir = 'out/swaps'
dataset = 'data/swaps'
min_inner_steps = 4                   # draws are 4 to 7, three times in four, 6.6 in the mean
inner_steps = 16
recursion = 'loop'                    # y alone: with z one run of three fades at 64 passes
draw_after = 0.5                      # drawn from the start, neither of two runs followed three swaps
recall = False                        # with it 64 passes were worse: .87 for .98 with four
max_steps = 3610
eval_interval = 722
learning_rate = 1e-3                  # 2e-3, right for the shapes, was too high here (results/rates.md)
