"""
Finished runs side by side: two tables with 95 % intervals, and two pictures.

    python -m lab.compare out/trm out/plain                             # folders, patterns, copies of metrics.json
    python -m lab.compare out/trm out/plain --types=count --reach=.8    # judged by one type; when validation had .8
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path

import torch

from configurator import configure
from eval import type_order
from plumbing.console import printable, run_script, table
from plumbing.files import write_whole

# settings that do not change what is learnt, but for rounding
NOT_LEARNT = ('seed', 'fresh', 'out_dir', 'device', 'compile', 'log_interval', 'wandb', 'skip_bad_steps', 'cache_dir')
NEEDED = ('by_type', 'correct', 'curve', 'mflop_per_example')  # what metrics.json of a run that answers has


@dataclass
class CompareConfig:
    types: str | None = None    # the question types whose mean is judged, separated by commas; None: all
    reach: float | None = None  # say when validation Exact Match first had this value


def spread(values):
    """-> the mean, and half the width of its 95 % interval over the seeds (Student's t); None where there is one
    value only."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, None
    try:
        from scipy.stats import t
    except ImportError:
        raise ValueError('intervals over seeds: to have them, pip install scipy') from None
    sd = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** .5
    return mean, float(t.ppf(.975, n - 1)) * sd / n ** .5


def plus_minus(values, sign=''):
    mean, half = spread(values)
    return f'{mean:{sign}.3f}' + (f' ± {half:.3f}' if half is not None else '')


def read_run(path):
    """The metrics of a finished run, of its folder or of a copy of metrics.json. Raises: FileNotFoundError,
    ValueError."""
    file = Path(path) if path.endswith('.json') else Path(path) / 'metrics.json'
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such file; lab.compare takes the folders of finished runs')
    try:
        m = json.loads(file.read_text())
    except ValueError as e:
        raise ValueError(f'{file}: not the metrics.json of a run: {e}') from None
    if missing := [key for key in NEEDED if key not in m]:
        raise ValueError(f'{file}: no {missing[0]}; lab.compare takes runs that answer questions and that train.py '
                         f'finished')
    return m


def alike(a, b):
    """Whether two runs differ in their seed, place and speed alone. A setting that only one of them knows, as it is
    newer than the other, does not part them."""
    known = (a['settings'].keys() & b['settings'].keys()) - set(NOT_LEARNT)
    return all(a['settings'][key] == b['settings'][key] for key in known)


def grouped(paths):
    """Reads finished runs -> {name: [metrics of every seed]}: runs that are alike belong together, each seed once.
    What a pattern matches and is no finished run is left out, and said. Raises: FileNotFoundError, ValueError."""
    patterns = {}
    for pattern in map(str, paths):
        for path in sorted(glob(pattern)) or [pattern]:
            patterns[path] = pattern
    groups = []  # each a list of (path, metrics)
    for path, pattern in patterns.items():
        try:
            m = read_run(path)
        except (FileNotFoundError, ValueError) as e:
            if path == pattern or 'not the metrics.json' in str(e):
                raise
            print(f'left out: {e}')
            continue
        for group in groups:
            if alike(m, group[0][1]) and m['seed'] not in [other['seed'] for _, other in group]:
                break
        else:
            group = []
            groups.append(group)
        group.append((path.removesuffix('.json'), m))
    if not groups:
        raise ValueError(f'no finished run among {", ".join(map(str, paths))}')
    named = {}
    for group in groups:
        name = group[0][0]
        if len(group) > 1:
            name = re.sub('[-_]+$', '', os.path.commonprefix([path for path, _ in group]))
        if name in named:
            name = f'{name} ({len(named) + 1})'
        named[name] = [m for _, m in group]
    return named


def depth(m):
    """How many blocks an answer position goes through, one after the other."""
    s = m['settings']
    if s['kind'] == 'plain':
        return s['n_layer']
    passes = s['inner_steps'] + (s['recursion'] == 'add')
    return s['n_layer'] * s['outer_steps'] * passes


def training_flops(m):
    return m['mflop_per_example'] * 1e6 * m['step'] * m['settings']['batch_size'] * m['settings']['grad_accum']


def paired(runs, base):
    """The difference in Exact Match, question by question, of the means over the seeds -> mean, and half the width of its 95 % interval over the
    questions; None where the runs did not answer the same questions, or none but captions."""
    rows = [[m['correct'] for m in group] for group in (runs, base)]
    if len({(m['settings']['dataset'], re.sub(r'\d', 'x', m['correct'])) for m in (*runs, *base)}) > 1:
        return None
    asked = [i for i, c in enumerate(rows[0][0]) if c != '-']
    if not asked:
        return None
    ours, theirs = ([sum(row[i] == '1' for row in group) / len(group) for i in asked] for group in rows)
    d = [a - b for a, b in zip(ours, theirs)]
    mean = sum(d) / len(d)
    return mean, 1.96 * (sum((x - mean) ** 2 for x in d) / len(d)) ** .5 / len(d) ** .5


def by_seed(runs, base, score):
    """The differences in `score` between runs of the same seed, a list."""
    ours, theirs = ({m['seed']: score(m) for m in group} for group in (runs, base))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def reached(m, em):
    """The first step at which validation had this Exact Match, with the seconds of training until then, as text."""
    return next((f'{step} ({seconds:.0f} s)' for step, seconds, there in m['curve'] if there >= em), 'never')


def compare(paths, judged=None, reach=None):
    """Two tables of finished runs, mean and 95 % interval over the seeds: what they are and what they have in the mean over the question types `judged`
    (all), each also against the first one; and every type. With matplotlib comparison.png and comparison_curves.png beside the first. -> text"""
    groups = grouped(paths)
    types = sorted({t for runs in groups.values() for m in runs for t in m['by_type']}, key=type_order)
    for name, runs in groups.items():
        if missing := [t for t in judged or () if any(t not in m['by_type'] for m in runs)]:
            raise ValueError(f"--types={','.join(missing)}: {name} has no such type; expected some of {', '.join(types)}")
    score = lambda m: sum(m['by_type'][t]['em'] for t in judged) / len(judged) if judged else m['em_types']
    first = next(iter(groups.values()))
    about, scores = [], []
    for name, runs in groups.items():
        m, other = runs[0], runs is not first
        seeds, questions = other and by_seed(runs, first, score), other and paired(runs, first)
        about.append({
            'run': printable(name), 'seeds': len(runs), 'core': f"{m['parameters']['core']:,}", 'total': f"{m['parameters']['total']:,}", 'depth': depth(m),
            'training steps': m['step'], 'TFLOP': f'{spread([training_flops(r) for r in runs])[0] / 1e12:.1f}', 'min': f"{spread([r['train_s'] for r in runs])[0] / 60:.1f}",
            'mean of types': plus_minus([score(r) for r in runs]), 'by seed': ' '.join(f'{score(r):.3f}' for r in runs),
            'minus the first': plus_minus(seeds, sign='+') if seeds else '-', 'em minus the first': f'{questions[0]:+.3f} ± {questions[1]:.3f}' if questions else '-'}
            | ({f'validation {reach:g} at training step': ', '.join(reached(r, reach) for r in runs)} if reach else {}))
        of_type = lambda t: [r['by_type'][t]['f1' if t == 'describe' else 'em'] for r in runs if t in r['by_type']]
        scores.append({'run': printable(name)} | {key: plus_minus([r[key] for r in runs]) for key in ('em', 'f1')}
                      | {printable(t): plus_minus(of_type(t)) if of_type(t) else '-' for t in types})
    draw_comparison(groups, Path((sorted(glob(str(paths[0]))) or paths)[0]).parent)
    made = sorted({f"{m['commit']} on {m['device']}, {m['threads']} threads" for runs in groups.values() for m in runs})
    return ('\n'.join(table(list(rows[0]), [list(row.values()) for row in rows]) for rows in (about, scores)) +
            f"\nmean of types: {', '.join(judged or ['all'])}; ±: 95 % interval over the seeds, of `minus the first` over the differences between runs of one seed, of `em minus the"
            f" first` over the questions; describe: f1\nTFLOP, min: of the whole training; depth: blocks in a row for an answer token; commit {'; '.join(made)}")


def draw_comparison(groups, folder):
    """Draws Exact Match and F1 against depth, parameters and FLOPs to comparison.png, the validation curves and the question types to comparison_curves.png."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('comparison.png not drawn: pip install matplotlib')
        return
    styles = {name: dict(color=f'C{k % 10}', label=printable(label).replace('$', '')) for k, (name, label) in enumerate(zip(groups, labels(groups)))}
    for file, size, draw in (('comparison.png', (13, 7.5), draw_results), ('comparison_curves.png', (13, 4), draw_courses)):
        figure = Figure(figsize=size, layout='constrained')
        axes = draw(figure, groups, styles)
        for axis in axes:
            axis.grid(alpha=.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
        write_whole(folder / file, partial(figure.savefig, format='png', dpi=100))


def labels(names):
    """The names of files without the words, between underscores, that all of them begin or end with."""
    words = [os.path.basename(name).split('_') for name in names]
    for end in (0, -1):
        while len({w[end] for w in words}) == 1 < min(len(words), *map(len, words)):
            words = [w[1:] if end == 0 else w[:-1] for w in words]
    return ['_'.join(w) for w in words]


def draw_results(figure, groups, styles):
    """Exact Match and F1 against depth, parameters and FLOPs. -> axes"""
    words = lambda x: f'{x:.3g}' if x < 1e3 else f'{x / 1e3:.3g}k' if x < 1e6 else f'{x / 1e6:.3g}M'
    axes = figure.subplots(2, 3, sharey='row')
    places = {'blocks in a row for an answer token': depth, 'core parameters': lambda m: m['parameters']['core'],
              'TFLOP of the whole training': lambda m: training_flops(m) / 1e12}
    for row, key in zip(axes, ('em', 'f1')):
        for axis, (label, place) in zip(row, places.items()):
            at = sorted({place(runs[0]) for runs in groups.values()})
            for k, (name, runs) in enumerate(groups.items()):
                mean, half = spread([m[key] for m in runs])
                beside = 1.01 ** (k - len(groups) / 2)  # so that equals do not hide each other
                axis.errorbar(place(runs[0]) * beside, mean, half or 0, fmt='o', capsize=3, **styles[name])
            axis.set(xlabel=label, xscale='log', xlim=(at[0] / 1.3, at[-1] * 1.3))
            axis.set_xticks([x for i, x in enumerate(at) if i == 0 or x > 1.1 * at[i - 1]])
            axis.xaxis.set_major_formatter(lambda x, _: words(x))
            axis.minorticks_off()
        row[0].set_ylabel({'em': 'Exact Match', 'f1': 'token F1'}[key])
    return axes.flatten()


def draw_courses(figure, groups, styles):
    """Validation curves by training step and by FLOPs, which do not depend on the machine, the mean over the seeds, and the test split by question type. -> axes"""
    left, middle, right = axes = figure.subplots(1, 3)
    types = sorted({t for runs in groups.values() for t in runs[0]['by_type'] if t != 'describe'}, key=type_order)
    for name, runs in groups.items():
        steps, _, em = torch.tensor([m['curve'] for m in runs]).mean(0).T
        for axis, times in ((left, steps), (middle, steps * training_flops(runs[0]) / runs[0]['step'] / 1e12)):
            axis.plot(times, em, '-', linewidth=1.2, **styles[name])
        values = [spread([m['by_type'][t]['em'] for m in runs if t in m['by_type']] or [math.nan]) for t in types]
        right.errorbar(range(len(types)), [v for v, _ in values], [h or 0 for _, h in values], fmt='o-', capsize=3, markersize=3, linewidth=1.2, **styles[name])
    left.set(xlabel='training step', ylabel='validation Exact Match')
    middle.set(xlabel='TFLOP of training')
    right.set(ylabel='test Exact Match', ylim=(0, 1.03))
    right.set_xticks(range(len(types)), types, rotation=40, ha='right')
    return axes


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    paths = [path for word in argv if not word.startswith('-') for path in word.split(',')]
    s, _ = configure(CompareConfig, [word for word in argv if word.startswith('-')], '-m lab.compare PATH ...')
    if not paths:
        raise ValueError('which runs? python -m lab.compare out/trm out/plain')
    print(compare(paths, s.types and s.types.split(','), s.reach))


if __name__ == '__main__':
    run_script(main)
