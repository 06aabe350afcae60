"""
Which pass follows which swap? For stories like "swap 1 3, 3 2: what color is number 2?", told back to front:
number 2 holds what was number 3 before the last swap, which was number 1 before the first one. How well can
each of these places be read from the states after every pass, and which swap does every pass look at?

    python -m lab.swaps --out_dir=out/swaps
    python -m lab.swaps --out_dir=out/swaps --swaps=4 --inner_steps=8    # one more than it was trained on
"""

import re
import sys
from dataclasses import dataclass
from functools import partial

import torch

from configurator import configure
from eval import load_run, questions_to_judge, set_depth
from lab.cells import probe, scores_of
from lab.passes import attention_of, word_of
from lab.states import watch_passes
from plumbing.console import run_script, table
from plumbing.features import ContextTokens
from plumbing.machine import on_device, pick_device
from plumbing.run import read_checkpoint

DECAY = 1e-3  # of the probe's weights


@dataclass
class SwapsConfig:
    out_dir: str = 'out/swaps'      # the run to look into
    swaps: int = 3                  # stories with so many swaps
    split: str = 'train'            # train, val or test; a probe learns from a half, the other judges it
    most: int = 4000                # stories that are asked, always the same
    inner_steps: int | None = None  # another number of passes than in training
    encoder: str | None = None      # where the encoder of the run lies now
    batch_size: int = 250           # stories at a time
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')
        for key in ('swaps', 'most', 'batch_size'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least 1')


def places_of(question):
    """The place that is asked for, and where its object was before the last swap, the one before, ...

    'swap 1 3, 3 2: what color is number 2?' -> [2, 3, 1]
    """
    places = [int(re.search(r'number (\d+)', question)[1])]
    for pair in reversed(re.findall(r'(\d+) (\d+)(?=[,:])', question)):
        here = places[-1]
        a, b = map(int, pair)
        places.append({a: b, b: a}.get(here, here))
    return places


def swap_of_token(words, swaps):
    """For every token of a question the swap that it tells of, the last one is 0; -1 for the other tokens.
    words: the tokens as text."""
    begin = next((i for i, word in enumerate(words) if word.strip() == 'swap'), 0)
    end = next((i for i, word in enumerate(words) if i > begin and ':' in word), len(words))
    told = swaps - 1
    of_token = []
    for i, word in enumerate(words):
        of_token.append(told if begin < i < end and any(map(str.isdigit, word)) else -1)
        told -= begin < i < end and ',' in word
    return of_token


@torch.no_grad()
def looked_into(decoder, questions, tokens_of, chosen, swaps, text_of, device, batch_size):
    """States, attention and answers of the first word, pass by pass.

    text_of: from a token to its text -> states (passes, n, streams * C); attention on the numbers of each
    swap, the last swap first, (passes, n, swaps); and whether the answer of a pass is right (passes, n)
    """
    states, looked, right = [], [], []
    for start in range(0, len(chosen), batch_size):
        rows = chosen[start:start + batch_size]
        batch = on_device(questions.batch(rows), device)
        vision, sound = tokens_of(batch)
        context = decoder.read_context(vision, batch['question'], sound)
        passes = watch_passes(decoder)
        first = batch['answer'][:, :1]                                 # (B, 1): <bos>
        attention = attention_of(decoder, context, first)              # (B, nh, T, S + T) a block of a pass
        del decoder.network  # unwatched again
        after = torch.stack([made for _, made in passes])              # (passes, B, streams, C)
        words = decoder.head(after[:, :, 0]).argmax(-1)                # (passes, B)

        Q = batch['question'].size(1)
        S = context.mask.size(-1)
        mean = torch.stack([att.float().mean((1, 2)) for att in attention])        # (all blocks, B, S + T)
        mean = mean.unflatten(0, (len(passes), -1)).mean(1)[..., S - Q:S]          # (passes, B, Q)
        told = torch.full((len(rows), Q), -1, device=device)
        for k, i in enumerate(rows):
            of_row = swap_of_token([text_of(token) for token in questions.tokens[i][0]], swaps)
            told[k, :len(of_row)] = torch.tensor(of_row)
        on_swap = [(mean * (told == j)).sum(-1) for j in range(swaps)]             # (passes, B) each
        states.append(after.flatten(2).float())                        # (passes, B, streams * C)
        looked.append(torch.stack(on_swap, -1))                        # (passes, B, swaps)
        right.append(words == batch['targets'][:, 0])
    return torch.cat(states, 1), torch.cat(looked, 1), torch.cat(right, 1)


def readable(states, places):
    """How often a linear probe reads each place from the states of each pass, on the half it has not seen.

    Shapes: states (passes, n, W), places (n, swaps + 1), from 0 on -> (passes, swaps + 1), shares of 1
    """
    half = len(places) // 2
    shares = torch.zeros(len(states), places.size(1))
    for k, of_pass in enumerate(states):
        of_pass = (of_pass - of_pass[:half].mean(0)) / (of_pass[:half].std(0) + 1e-6)      # (n, W)
        for j in range(places.size(1)):
            w = probe(of_pass[:half], places[:half, j], int(places.max()) + 1, DECAY)
            shares[k, j] = (scores_of(of_pass[half:], w).argmax(-1) == places[half:, j]).float().mean()
    return shares


def main(argv=None):
    s, _ = configure(SwapsConfig, sys.argv[1:] if argv is None else argv, '-m lab.swaps')
    device = pick_device(s.device)
    checkpoint = read_checkpoint(s.out_dir)
    run = checkpoint['settings']
    decoder, encoders, tokenizer = load_run(checkpoint, device, s.encoder)
    if decoder.config.recursion == 'add' or decoder.config.kind == 'plain':
        raise ValueError(f"{s.out_dir}: expected kind='trm' and recursion='concat' or 'loop': of these "
                         'every pass makes y')
    set_depth(decoder, s.out_dir, s.inner_steps, None)
    questions = questions_to_judge(run, None, s.split, tokenizer)
    wanted = f'{s.swaps} swap' + 's' * (s.swaps > 1)
    chosen = [i for i, type in enumerate(questions.rows.type) if type == wanted][:s.most]
    if len(chosen) < 100:
        raise ValueError(f'{s.split}.parquet has {len(chosen)} rows of type {wanted!r}: expected at least '
                         '100')
    tokens_of = ContextTokens(run, encoders, questions.rows, device)
    text_of = partial(word_of, tokenizer)
    states, looked, right = looked_into(decoder, questions, tokens_of, chosen, s.swaps, text_of, device,
                                        s.batch_size)
    places = torch.tensor([places_of(questions.rows.question[i]) for i in chosen], device=device) - 1
    read = readable(states, places)                                    # (passes, swaps + 1)
    same = [(places[:, j] == places[:, j - 1]).float().mean().item() for j in range(1, s.swaps + 1)]

    back = ['asked for', *(f'{j} back' for j in range(1, s.swaps + 1))]
    head = ['pass', *(f'reads {name}' for name in back), *(f'looks {name}' for name in back[1:]), 'right']
    lines = [[k + 1, *(f'{share:.2f}' for share in read[k].tolist()),
              *(f'{share:.2f}' for share in looked[k].mean(0).tolist()), f'{right[k].float().mean():.3f}']
             for k in range(len(states))]
    print(f'{len(chosen)} stories of {wanted}, {s.split}. "1 back" is before the last swap.')
    print('Reads: places that a linear probe of the states gets right. Of the swaps '
          f'{sum(same) / len(same):.2f} leave the object that is asked for where it is.')
    print('Looks: attention on the two numbers of a swap, mean over heads, blocks, y and z.')
    print(table(head, lines), end='')


if __name__ == '__main__':
    run_script(main)
