"""
A pretrained decoder beside transformers, on the same weights, in turn: tokens a second, written and trained
on. `python -m lab.bench --decoder=FOLDER` runs it.
"""

from functools import partial

import torch

from model import Decoder, cross_entropy
from plumbing.console import table
from plumbing.machine import autocast_to, fast_dtypes, flops_of, most_memory, seconds
from pretrained.decoders import found_folder


class Ours:
    """Our decoder, without pictures. Shapes of all that follows: question (B, Q), answer (B, A)."""

    def __init__(self, folder, device):
        # no end and no padding: answers get their whole length
        marks = dict(pad_id=-1, bos_id=0, eos_id=-1)
        self.model = Decoder.from_pretrained(folder, use_vision=False, **marks).to(device)

    def write(self, question, n):
        self.model.config.bos_id = question[0, -1].item()
        return self.model.generate(None, question[:, :-1], n)          # (B, n)

    def loss(self, question, answer):
        inputs = torch.cat([question[:, -1:], answer[:, :-1]], dim=1)  # (B, A)
        return self.model(None, question[:, :-1], inputs, answer)[1]


class Theirs:
    """transformers' decoder."""

    def __init__(self, folder, device):
        self.model = load_theirs(folder).to(device)
        # greedy, and no end: nothing of what its files say about writing
        self.model.generation_config = type(self.model.generation_config)(pad_token_id=0)

    def write(self, question, n):
        made = self.model.generate(question, attention_mask=torch.ones_like(question), max_new_tokens=n,
                                   do_sample=False)                    # (B, Q + n)
        return made[:, question.size(1):]                              # (B, n)

    def loss(self, question, answer):
        text = torch.cat([question, answer], dim=1)                    # (B, Q + A)
        logits = self.model(text, logits_to_keep=answer.size(1) + 1).logits    # (B, A + 1, V)
        return cross_entropy(logits[:, :-1], answer)


def load_theirs(folder):
    """Raises: ValueError with a hint where the package is not there."""
    try:
        from transformers import AutoModelForCausalLM
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (ImportError, RuntimeError) as e:
        raise ValueError(f'--decoder: to compare with it, pip install transformers ({e})') from None


def compare_decoders(b, peak_of):
    """Prints a table, a column for each; every figure is the fastest of b.repeats rounds, which alternate.
    peak_of: from a dtype to the FLOPs a second that the machine can do. Raises: ValueError."""
    folder = found_folder(b.decoder)
    dtype = fast_dtypes(b.device)[-1]
    both = {'ours': Ours(folder, b.device), 'transformers': Theirs(folder, b.device)}
    vocab_size = both['ours'].model.config.vocab_size
    torch.manual_seed(0)
    question, answer = (torch.randint(3, vocab_size, (b.batch_size, n), device=b.device)
                        for n in (b.n_question + b.n_image, b.n_answer))
    text = question[:1]  # a single one is written on: as in a chat
    times = {name: {'write': [], 'train': []} for name in both}

    def train(one):
        with autocast_to(dtype, b.device):
            one.loss(question, answer).backward()
        one.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def write(one):
        written[one] = one.write(text, b.n_answer)

    written = {}
    for _ in range(b.repeats + 1):  # the first round warms up
        for name, one in both.items():
            times[name]['write'].append(seconds(partial(write, one), b.device))
            times[name]['train'].append(seconds(partial(train, one), b.device))
    same = (written[both['ours']] == written[both['transformers']]).float().mean().item()
    peak = peak_of(dtype)
    rows = []
    for name, of_name in times.items():
        write_s, train_s = (min(of_name[key][1:]) for key in ('write', 'train'))
        rows.append([name, f'{b.n_answer / write_s:.1f}', f'{1e3 * train_s:.0f}',
                     f'{b.batch_size * (question.size(1) + b.n_answer) / train_s:.0f}',
                     f'{flops_of(partial(train, both[name])) / train_s / peak:.0%}'])
    print(f'{folder}: a question of {question.size(1)} tokens, {b.n_answer} to write or to train on, '
          f'{b.batch_size} rows in training; {same:.0%} of the words written are the same')
    print(table(['', 'tokens/s written', 'ms a training step', 'tokens/s trained', 'MFU'], rows), end='')
    print(f'at most {most_memory(b.device) / 1e9:.2f} GB of memory, both together')
