"""
Finished runs side by side: two tables with 95 % intervals, and two pictures.

    python -m lab.compare out/trm out/plain                   # folders, patterns, copies of metrics.json
    python -m lab.compare out/trm out/plain --types=count     # judged by one question type alone
    python -m lab.compare out/trm out/plain --reach=.8        # when validation first had .8
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
from model import ModelConfig, build_model
from plumbing.console import printable, run_script, table
from plumbing.files import write_whole
from plumbing.plots import harmless, plain_text
from plumbing.results import type_order
from plumbing.run import LATER

# settings that do not change what is learnt, but for rounding, and the seed
NOT_LEARNT = ('seed', 'fresh', 'out_dir', 'device', 'compile', 'log_interval', 'wandb', 'skip_bad_steps',
              'cache_dir')
NEEDED = ('by_type', 'correct', 'curve', 'mflop_per_example')  # what metrics.json of a run that answers has


@dataclass
class CompareConfig:
    types: str | None = None    # the question types whose mean is judged, separated by commas; None: all
    reach: float | None = None  # say when validation Exact Match first had this value


def spread(values):
    """The mean, and half the width of its 95 % interval over the seeds (Student's t).

    -> (mean, half), half None where there is one value only. Raises: ValueError without scipy.
    """
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
    """The metrics of a finished run, from its folder or a copy of metrics.json.

    Raises: FileNotFoundError, ValueError.
    """
    file = Path(path) if path.endswith('.json') else Path(path) / 'metrics.json'
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such file; lab.compare takes the folders of finished runs')
    try:
        m = json.loads(file.read_text())
    except ValueError as e:
        raise ValueError(f'{file}: not the metrics.json of a run: {e}') from None
    for key in NEEDED:
        if key not in m:
            raise ValueError(f'{file}: no {key}; lab.compare takes runs that answer questions and that '
                             f'train.py finished')
    return m


def alike(a, b):
    """Whether two runs differ in their seed, place and speed alone.

    A setting that only one of them knows, as the code was older or newer, does not part them.
    """
    known = (settings_of(a).keys() & settings_of(b).keys()) - set(NOT_LEARNT)
    return all(same_setting(a, b, key) for key in known)


def settings_of(m):
    """The settings of a run, those included that came after it."""
    return LATER | m['settings']


def same_setting(a, b, key):
    """Whether two runs agree in a setting; in a path, where its content has a fingerprint, by that."""
    for m in (a, b):
        if not m.get(f'{key}_fingerprint'):
            return settings_of(a)[key] == settings_of(b)[key]
    return a[f'{key}_fingerprint'] == b[f'{key}_fingerprint']


def grouped(paths):
    """Reads finished runs -> {name: [metrics of every seed]}: what is alike belongs together, each seed once.

    What a pattern matches and is no finished run is left out, and said.
    Raises: FileNotFoundError, ValueError.
    """
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
            seeds = [other['seed'] for _, other in group]
            if alike(m, group[0][1]) and m['seed'] not in seeds:
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
    """How many blocks an answer position goes through, one after the other: counted on a tiny decoder that
    has the run's settings; 0 where that cannot be made any more."""
    form = {key: m['settings'][key] for key in ('kind', 'recursion', 'n_layer', 'inner_steps', 'outer_steps')}
    form['recur_layers'] = m['settings'].get('recur_layers')
    if m['settings'].get('decoder'):  # a pretrained one
        form['norm'] = 'rms'
    try:
        decoder = build_model(ModelConfig(**form, n_embd=2, n_head=1, vocab_size=4, use_vision=False))
    except ValueError:  # a form of another time, which this code does not know
        return 0
    context = decoder.read_context(None, torch.ones(1, 1, dtype=torch.long))
    calls = []

    def note(*call):
        calls.append(call)

    for block in decoder.blocks:
        block.register_forward_hook(note)
    decoder.answer_states(context, torch.ones(1, 1, dtype=torch.long))
    return len(calls)


def training_flops(m):
    s = m['settings']
    return m['mflop_per_example'] * 1e6 * m['step'] * s['batch_size'] * s['grad_accum']


def paired(runs, base):
    """The difference in Exact Match, question by question, of the means over the seeds.

    -> its mean, and half the width of its 95 % interval over the questions; None where the runs did not
    answer the same questions, or none but captions
    """
    asked = {re.sub(r'\d', 'x', m['correct']) for m in (*runs, *base)}
    if len(asked) > 1 or not all(same_setting(m, base[0], 'dataset') for m in (*runs, *base)):
        return None
    questions = [i for i, mark in enumerate(runs[0]['correct']) if mark != '-']
    if not questions:
        return None
    differences = []
    for i in questions:
        ours = sum(m['correct'][i] == '1' for m in runs) / len(runs)
        base_has = sum(m['correct'][i] == '1' for m in base) / len(base)
        differences.append(ours - base_has)
    n = len(differences)
    mean = sum(differences) / n
    sd = (sum((d - mean) ** 2 for d in differences) / n) ** .5
    return mean, 1.96 * sd / n ** .5  # so many questions that the normal distribution will do


def by_seed(runs, base, score):
    """The differences in `score` between runs of the same seed, a list."""
    base_scores = {m['seed']: score(m) for m in base}
    return [score(m) - base_scores[m['seed']] for m in runs if m['seed'] in base_scores]


def reached(m, em):
    """The first step at which validation had this Exact Match, with the seconds of training until then."""
    for step, seconds, best in m['curve']:
        if best >= em:
            return f'{step} ({seconds:.0f} s)'
    return 'never'


def types_of(runs):
    """The question types of some runs, in the order of tables."""
    return sorted({type for m in runs for type in m['by_type']}, key=type_order)


# ----------------------------------------------------------------------------
# two tables

def about_row(name, runs, first, score, reach):
    """What the runs of a group are, and how they do against the first group. -> {column: cell}"""
    m = runs[0]
    tflop = spread([training_flops(run) for run in runs])[0] / 1e12
    minutes = spread([run['train_s'] for run in runs])[0] / 60
    row = {
        'run': printable(name),
        'seeds': len(runs),
        'core': f"{m['parameters']['core']:,}",
        'total': f"{m['parameters']['total']:,}",
        'depth': depth(m),
        'training steps': m['step'],
        'TFLOP': f'{tflop:.1f}',
        'min': f'{minutes:.1f}',
        'mean of types': plus_minus([score(run) for run in runs]),
        'by seed': ' '.join(f'{score(run):.3f}' for run in runs),
        'minus the first': '-',
        'em minus the first': '-',
    }
    if runs is not first:
        differences = by_seed(runs, first, score)
        if differences:
            row['minus the first'] = plus_minus(differences, sign='+')
        questions = paired(runs, first)
        if questions:
            mean, half = questions
            row['em minus the first'] = f'{mean:+.3f} ± {half:.3f}'
    if reach:
        row[f'validation {reach:g} at training step'] = ', '.join(reached(run, reach) for run in runs)
    return row


def score_row(name, runs, types):
    """Exact Match and F1 of all questions, and the score of each type. -> {column: cell}"""
    row = {'run': printable(name)}
    for key in ('em', 'f1'):
        row[key] = plus_minus([m[key] for m in runs])
    for type in types:
        key = 'f1' if type == 'describe' else 'em'  # two captions are never the same string
        scores = [m['by_type'][type][key] for m in runs if type in m['by_type']]
        row[printable(type)] = plus_minus(scores) if scores else '-'
    return row


def table_of(rows):
    """A table of dicts that have the same keys."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def compare(paths, judged=None, reach=None):
    """Two tables of finished runs, with the mean and its 95 % interval over the seeds. -> text

    The first says what they are and what they have in the mean over the question types `judged` (all), also
    against the first one; the second has every type. With matplotlib, comparison.png and
    comparison_curves.png are drawn beside the first run.
    """
    groups = grouped(paths)
    everything = [m for runs in groups.values() for m in runs]
    types = types_of(everything)
    for name, runs in groups.items():
        missing = [type for type in judged or () if any(type not in m['by_type'] for m in runs)]
        if missing:
            raise ValueError(f"--types={','.join(missing)}: {name} has no such type; "
                             f"expected some of {', '.join(types)}")

    def score(m):
        if judged:
            return sum(m['by_type'][type]['em'] for type in judged) / len(judged)
        return m['em_types']

    first = next(iter(groups.values()))
    about = [about_row(name, runs, first, score, reach) for name, runs in groups.items()]
    scores = [score_row(name, runs, types) for name, runs in groups.items()]
    found = sorted(glob(str(paths[0]))) or paths
    draw_comparison(groups, Path(found[0]).parent)
    made = sorted({f"{m['commit']} on {m['device']}, {m['threads']} threads" for m in everything})
    notes = (f"mean of types: {', '.join(judged or ['all'])}; ±: 95 % interval over the seeds, of `minus "
             f"the first` over the differences between runs of one seed, of `em minus the first` over the "
             f"questions; describe: f1\nTFLOP, min: of the whole training; depth: blocks in a row for an "
             f"answer token; commit {'; '.join(made)}")
    return '\n'.join([table_of(about), table_of(scores), *unequal(groups), notes])


def unequal(groups):
    """What a difference between groups may come from beside what is compared, a line each."""
    lines = []
    for key in ('max_steps', 'dataset', 'seed'):
        said = {name: said_of(runs, key) for name, runs in groups.items()}
        first = next(iter(groups.values()))[0]
        differ = len(set(said.values())) > 1
        if key == 'dataset':
            differ = not all(same_setting(m, first, key) for runs in groups.values() for m in runs)
        if differ:
            each = '; '.join(f'{printable(name)}: {text}' for name, text in said.items())
            lines.append(f'not the same {key} | {each}')
    return [*lines, ''] if lines else []


def said_of(runs, key):
    """The values that the runs of a group have of a setting, as text; of a data set its fingerprint too."""
    values = []
    for m in sorted(runs, key=lambda m: m['seed']):
        value = str(m['settings'].get(key, m.get(key, 'unknown')))
        if m.get(f'{key}_fingerprint'):
            parts = m[f'{key}_fingerprint'].items()
            value += f" ({', '.join(f'{split} {digest[:8]}' for split, digest in parts)})"
        values.append(printable(value))
    return ' '.join(dict.fromkeys(values))


# ----------------------------------------------------------------------------
# two pictures

def draw_comparison(groups, folder):
    """Draws comparison.png and comparison_curves.png, or says how to get them."""
    with harmless(folder / 'comparison.png'):
        try:
            with plain_text():
                draw_both(groups, folder)
        except ImportError:
            print('comparison.png not drawn: pip install matplotlib')


def draw_both(groups, folder):
    """Raises: ImportError without matplotlib."""
    from matplotlib.figure import Figure
    styles = {}
    for k, (name, label) in enumerate(zip(groups, labels(groups))):
        # a space in front, as a name that begins with _ would be left out of the legend
        styles[name] = dict(color=f'C{k % 10}', label=f' {printable(label)}')
    results = Figure(figsize=(13, 7.5), layout='constrained')
    draw_results(results, groups, styles)
    curves = Figure(figsize=(13, 4), layout='constrained')
    draw_curves_and_types(curves, groups, styles)
    for file, figure in (('comparison.png', results), ('comparison_curves.png', curves)):
        for axis in figure.axes:
            axis.grid(alpha=.3)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc='outside right upper', fontsize=8)
        write_whole(folder / file, partial(figure.savefig, format='png', dpi=100))


def labels(names):
    """The names of files without the words, between underscores, that all of them begin or end with."""
    words = [os.path.basename(name).split('_') for name in names]
    if len(words) == 1:
        return ['_'.join(words[0])]
    while min(map(len, words)) > 1 and len({w[0] for w in words}) == 1:
        words = [w[1:] for w in words]
    while min(map(len, words)) > 1 and len({w[-1] for w in words}) == 1:
        words = [w[:-1] for w in words]
    return ['_'.join(w) for w in words]


def short_number(x, _=None):
    """1234567 -> 1.23M; matplotlib also says which tick it is."""
    if x < 1e3:
        return f'{x:.3g}'
    if x < 1e6:
        return f'{x / 1e3:.3g}k'
    return f'{x / 1e6:.3g}M'


def core_parameters(m):
    return m['parameters']['core']


def training_tflop(m):
    return training_flops(m) / 1e12


def draw_results(figure, groups, styles):
    """Exact Match and F1 against depth, parameters and FLOPs."""
    axes = figure.subplots(2, 3, sharey='row')
    columns = {'blocks in a row for an answer token': depth, 'core parameters': core_parameters,
               'TFLOP of the whole training': training_tflop}
    for row, key, score in zip(axes, ('em', 'f1'), ('Exact Match', 'token F1')):
        row[0].set_ylabel(score)
        for axis, (label, place_of) in zip(row, columns.items()):
            places = sorted({place_of(runs[0]) for runs in groups.values()})
            for k, (name, runs) in enumerate(groups.items()):
                mean, half = spread([m[key] for m in runs])
                beside = 1.01 ** (k - len(groups) / 2)  # so that equals do not hide each other
                x = place_of(runs[0]) * beside
                axis.errorbar(x, mean, half or 0, fmt='o', capsize=3, **styles[name])
            axis.set(xlabel=label, xscale='log', xlim=(places[0] / 1.3, places[-1] * 1.3))
            apart = [x for i, x in enumerate(places) if i == 0 or x > 1.1 * places[i - 1]]
            axis.set_xticks(apart)
            axis.xaxis.set_major_formatter(short_number)
            axis.minorticks_off()


def draw_curves_and_types(figure, groups, styles):
    """Validation by training step and by FLOPs, which no machine changes, and the test split by type."""
    by_step, by_flops, by_type = figure.subplots(1, 3)
    types = [type for type in types_of([runs[0] for runs in groups.values()]) if type != 'describe']
    for name, runs in groups.items():
        m = runs[0]
        curve = torch.tensor([run['curve'] for run in runs]).mean(0)   # (validations, 3), over the seeds
        steps, _, em = curve.T                                         # (validations,) each
        tflop = steps * training_flops(m) / m['step'] / 1e12
        by_step.plot(steps, em, '-', linewidth=1.2, **styles[name])
        by_flops.plot(tflop, em, '-', linewidth=1.2, **styles[name])
        means = []
        halves = []
        for type in types:
            scores = [run['by_type'][type]['em'] for run in runs if type in run['by_type']]
            mean, half = spread(scores or [math.nan])  # nan: a gap in the line
            means.append(mean)
            halves.append(half or 0)
        by_type.errorbar(range(len(types)), means, halves, fmt='o-', capsize=3, markersize=3, linewidth=1.2,
                         **styles[name])
    by_step.set(xlabel='training step', ylabel='validation Exact Match')
    by_flops.set(xlabel='TFLOP of training')
    by_type.set(ylabel='test Exact Match', ylim=(0, 1.03))
    by_type.set_xticks(range(len(types)), [printable(type) for type in types], rotation=40, ha='right')


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if not word.startswith('-')]  # configure takes such words for config files
    paths = [path for word in words for path in word.split(',') if path]
    flags = [word for word in argv if word.startswith('-')]
    s, _ = configure(CompareConfig, flags, '-m lab.compare PATH ...')
    if not paths:
        raise ValueError('which runs? python -m lab.compare out/trm out/plain')
    judged = s.types.split(',') if s.types else None
    print(compare(paths, judged, s.reach))


if __name__ == '__main__':
    run_script(main)
