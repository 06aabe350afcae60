"""
What a linear probe makes of the tokens of mosaics (prepare/mosaics.py): how often it names a photograph from
the tokens of its part of the picture, and the EM of answers that follow by rule from what it names. It is no
upper bound: a decoder reads the tokens one by one.

    python -m lab.cells --out_dir=out/mosaics --groups=groups.txt
"""

import math
import re
import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from configurator import configure
from eval import load_run, rows_to_judge, scored, summaries
from plumbing.console import run_script
from plumbing.features import ContextTokens
from plumbing.machine import pick_device
from plumbing.results import result_table
from plumbing.run import read_checkpoint
from prepare.mosaics import ASK, SIDES, counts_of, neighbours, read_groups

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the probe's weights; the best on val is taken


@dataclass
class CellsConfig:
    out_dir: str = 'out/mosaics'  # the run whose encoder is looked at, and whose dataset
    grid: int = 2                 # photographs along a side of a mosaic, as it was made with
    groups: str | None = None     # the file of groups that the mosaics were made with
    encoder: str | None = None    # where the encoder of the run lies now
    split: str = 'test'           # train, val or test
    device: str = 'auto'          # auto (a GPU if there is one), cpu, cuda, ...


@torch.no_grad()
def cells_of(tokens, grid):
    """The mean token of every cell; one that two cells share counts for both.
    Shapes: (B, N, D) -> (B, grid * grid, D)"""
    side = math.isqrt(tokens.size(1))
    rows = tokens.mT.unflatten(2, (side, side))                        # (B, D, side, side)
    return F.adaptive_avg_pool2d(rows, grid).flatten(2).mT             # (B, grid * grid, D)


def labelled(rows, vision_of, grid):
    """Cells that `what is at ...?` asks about: the answer is the label -> mean tokens (n, D), classes [n]"""
    places = [question for question, _ in ASK['what'](range(grid ** 2), [], {})]
    asked = [i for i, question in enumerate(rows.question) if question in places]
    if not asked:
        raise ValueError(f'{rows.path}: no row asks {places[0]!r}: expected mosaics, and their --grid')
    seen = []
    for start in range(0, len(asked), 500):
        some = asked[start:start + 500]
        cells = cells_of(vision_of(torch.tensor([rows.picture[i] for i in some])), grid)
        seen.append(cells[range(len(some)), [places.index(rows.question[i]) for i in some]])   # (B, D)
    return torch.cat(seen), [rows.references[i][0] for i in asked]


def probe(x, y, n_classes, decay):
    """Multinomial logistic regression. Shapes: x (n, D), y (n,) -> weights (D + 1, n_classes)"""
    x = F.pad(x, (0, 1), value=1.0)                                    # (n, D + 1)
    w = torch.zeros(x.size(1), n_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn='strong_wolfe')

    def loss():
        optimizer.zero_grad()
        total = F.cross_entropy(x @ w, y) + decay * w[:-1].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return w.detach()


def scores_of(x, w):
    """Shapes: (..., D), (D + 1, n_classes) -> (..., n_classes)"""
    return x @ w[:-1] + w[-1]


def answer(type, question, scores, classes, groups):
    """What follows from what is seen. Shapes: scores (cells, n_classes). Raises: ValueError."""
    cells = [classes[k] for k in scores.argmax(-1)]
    if type == 'compare':  # none of something is seen too
        counts = counts_of(cells, classes, groups)
        first, second = re.fullmatch(r'are there more (.*) than (.*)\?', question).groups()
        if {first, second} <= counts.keys():
            return 'yes' if counts[first] > counts[second] else 'no'
    elif type in ('relation', '2 steps'):
        return followed(question, scores, cells, classes)
    else:
        known = dict(ASK[type](cells, classes, groups))
        if question in known:
            return known[question]
    raise ValueError(f'{question}: not asked about {len(cells)} photographs of these classes and groups: '
                     'give the --groups and --grid that the mosaics were made with')


def followed(question, scores, cells, classes):
    """What is some steps away from the cell with the highest score for what is named, be it the best class of
    that cell or not: of those cells from which the steps stay in the picture."""
    steps = re.findall('|'.join(SIDES), question)[::-1]
    named = classes.index(re.search(r'the ([^?]*)\?', question.split(steps[0])[-1])[1])
    ends = {}
    for start in range(len(cells)):
        k = start
        for side in steps:
            k = None if k is None else neighbours(k, cells).get(side)
        if k is not None:
            ends[start] = k
    start = max(ends, key=lambda start: scores[start, named].item())
    return cells[ends[start]]


def main(argv=None):
    s, _ = configure(CellsConfig, sys.argv[1:] if argv is None else argv, '-m lab.cells')
    checkpoint = read_checkpoint(s.out_dir)
    run = checkpoint['settings']
    device = pick_device(s.device)
    _, encoders, _ = load_run(checkpoint, device, s.encoder)
    if 'encoder' not in encoders:
        raise ValueError(f'{s.out_dir}: a run without vision has no tokens to look at')
    rows = {split: rows_to_judge(run['dataset'], split) for split in ('train', 'val', s.split)}
    vision_of = {split: partial(ContextTokens(run, encoders, of_split, device).of, 'encoder')
                 for split, of_split in rows.items()}
    x, y = {}, {}
    for split, of_split in rows.items():
        x[split], names = labelled(of_split, vision_of[split], s.grid)
        if split == 'train':
            classes = sorted(set(names))
            mean, std = x['train'].mean(0), x['train'].std(0) + 1e-6
        x[split] = (x[split] - mean) / std
        y[split] = torch.tensor([classes.index(name) for name in names], device=device)
    best = None
    for decay in DECAYS:
        w = probe(x['train'], y['train'], len(classes), decay)
        right = (scores_of(x['val'], w).argmax(-1) == y['val']).float().mean().item()
        if best is None or right > best[0]:
            best = right, decay, w
    right, decay, w = best
    on_split = (scores_of(x[s.split], w).argmax(-1) == y[s.split]).float().mean().item()
    print(f'linear probe on the cells: {on_split:.3f} of {len(y[s.split])} named rightly ({right:.3f} on '
          f'val, decay {decay:g}, {len(y["train"])} cells to learn from)')
    # who sees what the probe sees, and reasons without a mistake
    groups = read_groups(s.groups, classes)
    judged = rows[s.split]
    predictions = []
    seen = {}  # picture: the scores of its cells
    for i, type in enumerate(judged.type):
        if type not in ASK:
            continue
        picture = judged.picture[i]
        if picture not in seen:
            cells = cells_of(vision_of[s.split](torch.tensor([picture])), s.grid)[0]           # (cells, D)
            seen[picture] = scores_of((cells - mean) / std, w)         # (cells, n_classes)
        follows = answer(type, judged.question[i], seen[picture], classes, groups)
        predictions.append(scored(judged, i, follows))
    print(result_table(summaries(predictions)))


if __name__ == '__main__':
    run_script(main)
