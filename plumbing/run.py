"""A run on disk: its checkpoint, its log, how far it is, and how it is stopped."""
import json
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from plumbing.console import clock
from plumbing.files import safe_load, write_whole
from plumbing.ranks import rank_and_world


@dataclass
class Run:
    """How far a run is: what its checkpoint holds beside weights, optimizers and settings. There is no random state in it, as a batch depends
    on (seed, step) alone and nothing else is drawn."""
    started: float             # time.time(), moved back by what earlier processes of the run took
    step: int = 0              # optimizer steps that are done
    best: dict | None = None   # step, scores and weights of the best validation
    train_s: float = 0.0       # seconds of training
    wall_s: float = 0.0        # seconds of everything, until the test split is evaluated
    total: dict = field(default_factory=dict)  # losses, summed up over the good steps since the last log line
    since: int = 0             # how many these are
    since_s: float = 0.0       # and the seconds of training since then
    rows: int = 0              # and the rows
    bad_steps: int = 0         # steps that were left out


class Stop:
    """Ctrl-C and SIGTERM: while it `waits`, the first one is only noted in `asked`, for the loop to end behind a whole step."""

    def __enter__(self):
        self.asked = self.waits = False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if not self.waits or self.asked and number == signal.SIGINT:  # whoever is impatient presses Ctrl-C again; SIGTERM may come from several sides
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """One line an event: on the console, in log.jsonl and, if asked for, on Weights & Biases."""

    def __init__(self, path, step, settings):
        self.path, self.max_steps, self.started, self.first = path, settings.max_steps, time.time(), step
        kept = [line for line in path.read_text().splitlines() if step_of(line) <= step] if step and path.is_file() else []
        write_whole(path, lambda f: f.writelines(line.encode() + b'\n' for line in kept))
        self.wandb = None
        if settings.wandb and rank_and_world()[0] == 0:
            import wandb
            self.wandb = wandb.init(project='nano-trm-vlm', name=path.parent.name, config=asdict(settings))

    def write(self, event):
        if rank_and_world()[0]:
            return
        with open(self.path, 'a') as f:
            f.write(json.dumps(event) + '\n')
        if self.wandb and event['event'] != 'start':
            self.wandb.log({f"{event['event']}/{k}": v for k, v in event.items() if isinstance(v, (int, float))}, step=event['step'])

    def line(self, step, values, event='step'):
        self.write(dict(event=event, step=step, **values))
        style = dict(loss='loss {:.4f}', lr='lr {:.2e}', gnorm='gnorm {:.2f}', ms='{:.1f} ms', examples_per_s='{:.0f} ex/s')
        parts = [style.get(k, k + ' {:.3f}').format(v) for k, v in values.items() if k not in ('train_s', 'metric')]
        eta = (time.time() - self.started) / max(1, step - self.first) * (self.max_steps - step)
        print(' | '.join([f'{event} {step}/{self.max_steps}', *parts, f'eta {clock(eta)}']), flush=True)


def step_of(line):
    """The step of a log line; of one that was torn when the machine went down, infinity."""
    try:
        return json.loads(line)['step']
    except (ValueError, LookupError, TypeError):
        return math.inf

FORMAT = 4  # of checkpoints; raised when their content changes


def read_checkpoint(out_dir, unfinished=False):
    """Reads out_dir/ckpt.pt, tensors and plain types only; nothing in it is run.

    Raises: FileNotFoundError without one; ValueError when it is of another kind or format or, unless `unfinished`, before the first validation.
    """
    path = Path(out_dir) / 'ckpt.pt'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; a run writes it: python train.py config/trm.py --out_dir={out_dir}')
    checkpoint = safe_load(path)
    found = checkpoint.get('format') if isinstance(checkpoint, dict) else None
    if found == FORMAT and checkpoint['run']['best'] is None and not unfinished:
        raise ValueError(f'{path}: the run was stopped before its first validation: there are no weights to evaluate yet; the command that began it goes on')
    if found != FORMAT:
        raise ValueError(f'{path}: checkpoint format {found}, this code reads format {FORMAT}; train again, or use the code that '
                         f'wrote it')
    return checkpoint


def read_log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]


def validation_curve(out_dir):
    """-> [(step, seconds of training until then, Exact Match), ...] of a run's validations."""
    curve, seconds = [], 0.
    for event in read_log(out_dir):
        seconds = event.get('train_s', seconds)
        if event['event'] == 'eval':
            curve.append((event['step'], seconds, event['em']))
    return curve
