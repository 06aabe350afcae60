"""Pictures that cost no result, and the curves of a run, drawn with matplotlib where it is installed."""

import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from plumbing.console import printable
from plumbing.files import write_whole
from plumbing.run import read_log


@contextmanager
def harmless(path):
    """A picture may never cost the result: where drawing it fails, whatever it is, one line says so."""
    try:
        yield
    except Exception as e:
        reason = ' '.join(str(e).split())[:200]
        print(f'{path}: not drawn ({type(e).__name__}: {printable(reason)})')


@contextmanager
def plain_text():
    """Within it matplotlib draws texts as they stand: it would take $, and with LaTeX _ and \\ too, for
    mathematics, and say at length which letters its fonts lack. Raises: ImportError without matplotlib."""
    from matplotlib import rc_context
    with rc_context({'text.parse_math': False, 'text.usetex': False}), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def draw_curves(out_dir):
    """Draws loss and Exact Match over the steps from log.jsonl to curves.png, or says why not."""
    path = Path(out_dir) / 'curves.png'
    with harmless(path):
        try:
            with plain_text():
                draw_losses_and_scores(path)
        except ImportError:
            print(f'{path.name} not drawn: pip install matplotlib, then run eval.py on this folder')


def draw_losses_and_scores(path):
    """Raises: ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    out_dir = path.parent
    events = read_log(out_dir)
    trained = [event for event in events if event['event'] == 'step']
    judged = [event for event in events if event['event'] == 'eval']
    # a Figure of its own, without pyplot: that asks for a screen, and keeps every figure
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)

    draw(left, trained, 'loss', '-', label='training', linewidth=1)
    draw(left, judged, 'loss', 'o-', label='validation', markersize=3)
    left.set(xlabel='step', ylabel='loss, nats per token', yscale='log')
    left.legend()
    # a loss may stay within one power of ten, and its axis would then have no number
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter('{x:g}')
    left.yaxis.set_minor_formatter('')

    # the two stages have different scores; a validation says which is its own
    metric = judged[0]['metric'] if judged else 'em'
    draw(right, judged, metric, 'o-', markersize=3, color='tab:green')
    right.set(xlabel='step', ylabel=f'validation {metric}', ylim=(0, 1))

    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    figure.suptitle(printable(str(out_dir)))
    write_whole(path, partial(figure.savefig, format='png', dpi=110))


def draw(axes, events, key, style, **more):
    """A line through what log events say of `key`, over their steps."""
    steps = [event['step'] for event in events]
    values = [event[key] for event in events]
    axes.plot(steps, values, style, **more)
