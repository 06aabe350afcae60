# The bench of the recursion claims: chains of "the next object right of the next object above the red circle", which only their start and every one of
# their steps decide (python data.py shapes --out=data/chains --chains=next ..., see config/experiments.sh).
out_dir = 'out/chains'
dataset = 'data/chains'
max_question_tokens = 64
max_steps = 1500
eval_interval = 100
