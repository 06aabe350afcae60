# Edge-Glass' experiment at its own scale: a TRM of width 512 answers questions about photographs, through
# the encoder of config/align_pixmo.py (64 tokens of 4096 dimensions). Settings are Edge-Glass' where it has
# them: its optimizer, ten epochs, GPT-2's vocabulary, limits of 32 tokens.
out_dir = 'out/trm_pixmo'
dataset = 'data/pixmo_qa'  # 8,400 / 1,800 / 1,800 questions, or captions as answers to a drawn prompt
encoder = 'out/align_pixmo/encoder.pt'
tokenizer = 'gpt2'
max_question_tokens = 32
max_answer_tokens = 32
truncate = True                       # most captions are longer
n_layer = 2
n_head = 8
n_embd = 512
inner_steps = 4
optimizer = 'adamw'
learning_rate = 1e-4
min_lr_ratio = 0.0
weight_decay = 0.01
warmup_ratio = 0.05
ema = 0.0
batch_size = 128                      # 32 rows of 32 answer tokens, as in Edge-Glass; see data.Questions
max_steps = 2625                      # ten times through 8,400 rows, 32 at a time
eval_interval = 262
norm = 'pre'                          # as in the runs of results/
qk_norm = False
recall = False
