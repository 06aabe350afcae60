"""
Exact Match, of the first reference to the letter, against the number of passes; captions are left out.

    python -m lab.depths --out_dir=out/trm               # prints a table, draws out/trm/depths.png
    python -m lab.depths --out_dir=out/trm --split=val --passes=1,2,64
    python -m lab.depths --out_dir=out/swaps --halts=0.1,0.3         # beside it, passes that halting takes
"""

import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from configurator import configure
from eval import load_run, passes_per_token, questions_to_judge, set_depth
from model import Halting
from plumbing.console import printable, progress, run_script, table
from plumbing.features import ContextTokens
from plumbing.files import write_whole
from plumbing.machine import on_device, pick_device
from plumbing.plots import harmless, plain_text
from plumbing.results import type_order
from plumbing.run import read_checkpoint


@dataclass
class DepthsConfig:
    out_dir: str = 'out/trm'                  # the run to look into; depths.png is written there
    passes: str = '1,2,3,4,6,8,12,16,32,64'   # numbers of passes
    halts: str = ''                           # thresholds of halting, as 0.1,0.3: marks in the picture
    most: int = 2000                          # rows of the split that are asked, always the same
    split: str = 'test'                       # train, val or test
    dataset: str | None = None                # another dataset folder than the one of the run
    encoder: str | None = None                # where the encoder of the run lies now
    batch_size: int | None = None             # rows at a time; None: as in training, 250 at most
    device: str = 'auto'                      # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')
        for word in self.passes.split(','):
            if not word.strip().isdecimal() or int(word) < 1:
                raise ValueError(f'passes={self.passes}: expected whole numbers from 1 on, as 1,2,64')
        for word in filter(None, self.halts.split(',')):
            if not re.fullmatch(r'\s*(\d+\.?\d*|\.\d+)\s*', word) or float(word) <= 0:
                raise ValueError(f'halts={self.halts}: expected numbers above 0, as 0.1,0.3')
        if self.most < 1:
            raise ValueError(f'most={self.most}: expected at least 1')
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f'batch_size={self.batch_size}: expected at least 1')


def asked_batches(questions, batch_size, most):
    """Rows that ask a question, as arrays. Raises: ValueError where none does."""
    type_of = questions.rows.type
    batches = [[i for i in rows if type_of[i] != 'describe']
               for rows in questions.rows_in_order(batch_size, most)]
    batches = [np.array(rows) for rows in batches if rows]
    if not batches:
        raise ValueError('no row asks a question: captions have no Exact Match')
    return batches


@torch.no_grad()
def scores_by_depth(decoder, questions, tokens_of, device, passes, batch_size, most):
    """-> {type: {passes: share of right answers}}, 'all' among the types.

    Greedy generation gives exactly the (first) reference if and only if every one of its tokens is the
    likeliest after the true ones before it.
    """
    asked = Counter()
    right = Counter()
    start = time.time()
    type_of = questions.rows.type
    batches = asked_batches(questions, batch_size, most)
    for k, rows in enumerate(batches):
        batch = on_device(questions.batch(rows), device)
        vision, sound = tokens_of(batch)
        context = decoder.read_context(vision, batch['question'], sound)
        types = [type_of[i] for i in rows]
        asked.update(types)
        for n in passes:
            y = decoder.answer_states(context, batch['answer'], inner_steps=n)[-1]         # (B, A, C)
            hit = decoder.head(y).argmax(-1) == batch['targets']                           # (B, A)
            whole = (hit | (batch['targets'] < 0)).all(1).tolist()                         # (B,)
            right.update((type, n) for type, good in zip(types, whole) if good)
        progress('asking', k + 1, len(batches), start)
    print()
    types = sorted(asked, key=type_order)
    scores = {type: {n: right[type, n] / asked[type] for n in passes} for type in types}
    total = sum(asked[type] for type in types)
    scores['all'] = {n: sum(right[type, n] for type in types) / total for n in passes}
    return scores


@torch.no_grad()
def scores_by_halt(decoder, questions, tokens_of, device, halts, batch_size, most):
    """-> {type: {halt: (mean of the passes that a token takes, share of right answers)}}"""
    asked = Counter()
    right = Counter()
    taken = Counter()
    start = time.time()
    pad_id = decoder.config.pad_id
    batches = asked_batches(questions, batch_size, most)
    for k, rows in enumerate(batches):
        batch = on_device(questions.batch(rows), device)
        vision, sound = tokens_of(batch)
        types = [questions.rows.type[i] for i in rows]
        asked.update(types)
        true = batch['targets']                                        # (B, A)
        for halt in halts:
            cache = Halting(halt)
            said = decoder.generate(vision, batch['question'], true.size(1), cache=cache,
                                    sound=sound)                       # (B, A)
            whole = ((said == true) | (true < 0)).all(1).tolist()      # (B,): after the end it says nothing
            right.update((type, halt) for type, good in zip(types, whole) if good)
            for type, n in zip(types, passes_per_token(cache.taken, said != pad_id)):
                taken[type, halt] += n
        progress('halting', k + 1, len(batches), start)
    print()
    return {type: {halt: (taken[type, halt] / asked[type], right[type, halt] / asked[type]) for halt in halts}
            for type in sorted(asked, key=type_order)}


def draw_depths(path, scores, halting):
    """A line for each type, Exact Match over passes, and a star for each threshold of halting, at the passes
    that it takes in the mean. Raises: ImportError without matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for type, of_type in scores.items():
        bold = type == 'all'
        line, = axes.plot(list(of_type), list(of_type.values()), 'o-', markersize=3, label=printable(type),
                          color='black' if bold else None, linewidth=2.5 if bold else 1)
        if type in halting:
            axes.plot(*zip(*halting[type].values()), '*', markersize=10, color=line.get_color())
    if halting:
        axes.plot([], [], 'k*', label='halting')
    axes.set(xscale='log', xlabel='passes of a cycle, at test time', ylabel='Exact Match', ylim=(0, 1.04))
    marks = list(scores['all'])
    axes.set_xticks(marks, map(str, marks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right center', fontsize=8)
    write_whole(path, partial(figure.savefig, format='png', dpi=110))


def main(argv=None):
    s, _ = configure(DepthsConfig, sys.argv[1:] if argv is None else argv, '-m lab.depths')
    device = pick_device(s.device)
    checkpoint = read_checkpoint(s.out_dir)
    run = checkpoint['settings']
    decoder, encoders, tokenizer = load_run(checkpoint, device, s.encoder)
    if decoder.config.kind == 'plain':
        raise ValueError(f'{s.out_dir} holds a plain decoder, which takes no passes')
    questions = questions_to_judge(run, s.dataset, s.split, tokenizer)
    tokens_of = ContextTokens(run, encoders, questions.rows, device)
    passes = sorted({int(word) for word in s.passes.split(',')})
    batch_size = s.batch_size or min(250, run['batch_size'])
    scores = scores_by_depth(decoder, questions, tokens_of, device, passes, batch_size, s.most)
    lines = [[printable(type), *(f'{of_type[n]:.3f}' for n in passes)] for type, of_type in scores.items()]
    print(table(['passes', *passes], lines), end='')
    halts = sorted(float(word) for word in s.halts.split(',') if word)
    halting = {}
    if halts:
        set_depth(decoder, s.out_dir, None, None, halts[0])  # only checks that it can
        halting = scores_by_halt(decoder, questions, tokens_of, device, halts, batch_size, s.most)
        lines = [[printable(type), *(f'{n:.1f}: {share:.3f}' for n, share in of_type.values())]
                 for type, of_type in halting.items()]
        print(f'passes taken, of {decoder.config.inner_steps}: Exact Match')
        print(table(['halt', *halts], lines), end='')
    path = Path(s.out_dir) / 'depths.png'
    with harmless(path):
        try:
            with plain_text():
                draw_depths(path, scores, halting)
            print(f'written: {path}')
        except ImportError:
            print(f'{path.name} not drawn: pip install matplotlib')


if __name__ == '__main__':
    run_script(main)
