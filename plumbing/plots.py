"""Curves of a run, drawn with matplotlib where it is installed."""

from functools import partial
from pathlib import Path

from plumbing.files import write_whole
from plumbing.run import read_log


def draw_curves(out_dir):
    """Draws loss and Exact Match over the steps from log.jsonl to curves.png; without matplotlib, says how to
    get them."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print('curves.png not drawn: pip install matplotlib, then run eval.py on this folder')
        return
    events = read_log(out_dir)
    steps, evals = [[e for e in events if e['event'] == kind] for kind in ('step', 'eval')]
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot([e['step'] for e in steps], [e['loss'] for e in steps], label='training', linewidth=1)
    left.plot([e['step'] for e in evals], [e['loss'] for e in evals], 'o-', label='validation', markersize=3)
    left.set(xlabel='step', ylabel='loss, nats per token', yscale='log')
    left.legend()
    metric = evals[0]['metric'] if evals else 'em'
    right.plot([e['step'] for e in evals], [e[metric] for e in evals], 'o-', markersize=3, color='tab:green')
    right.set(xlabel='step', ylabel=f'validation {metric}', ylim=(0, 1))
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter('{x:g}')
    left.yaxis.set_minor_formatter('')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(str(out_dir))
    write_whole(Path(out_dir) / 'curves.png', partial(figure.savefig, format='png', dpi=110))
