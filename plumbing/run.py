"""A run on disk: its checkpoint, its log, how far it is, and how it is stopped. Both stages share it."""

import gc
import json
import math
import os
import platform
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from plumbing.console import clock, printable, stop_signals
from plumbing.files import safe_load, write_whole
from plumbing.machine import commit, device_name, keep_freed_memory, most_memory
from plumbing.ranks import from_all, in_turn, rank_and_world

FORMAT = 5  # of checkpoints; raised when their content changes
FILES = ('ckpt.pt', 'metrics.json', 'metrics.unfinished.json', 'encoder.pt', 'predictions.jsonl',
         'vqav2_results.json', 'samples.png', 'curves.png', 'passes.png', 'depths.png')  # beside its log
LATER = dict(qk_norm=False, recall=False)  # settings that came later: what code without them did


@dataclass
class Run:
    """How far a run is: what its checkpoint holds beside weights, optimizers and settings.

    There is no random state in it: batches, and passes, are drawn by (seed, step) alone.
    """
    started: float             # time.time(), moved back by what earlier processes of the run took
    step: int = 0              # optimizer steps that are done
    validated: int = 0         # steps that were done at the last validation
    best: dict | None = None   # step, scores and weights of the best validation
    train_s: float = 0.0       # seconds of training
    wall_s: float = 0.0        # seconds of everything, until the test split is evaluated
    total: dict = field(default_factory=dict)  # losses, summed up over the good steps since the last log line
    since: int = 0             # how many these are
    since_s: float = 0.0       # and the seconds of training since then
    rows: int = 0              # and the rows
    gnorm: float = 0.0         # norm of the last good gradient
    bad_steps: int = 0         # steps that were left out

    def count(self, losses, gnorm, rows):
        """Adds a good step: its losses, a dict of floats, its gradient's norm, and how many rows it had."""
        self.total = {key: self.total.get(key, 0) + value for key, value in losses.items()}
        self.since += 1
        self.rows += rows
        self.gnorm = gnorm

    def facts(self, device):
        """What metrics.json says of the run."""
        return dict(step=self.step, best_step=self.best and self.best['step'], bad_steps=self.bad_steps,
                    train_s=self.train_s, wall_s=self.wall_s, peak_memory_gb=most_memory(device) / 1e9)


class Stop:
    """Ctrl-C, SIGTERM and SIGHUP: while it `waits`, the first is only noted in `asked`, and the step is
    finished."""

    def __enter__(self):
        self.asked = False
        self.waits = False
        numbers = [signal.SIGINT, *stop_signals()]
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, frame):
        # whoever is impatient presses Ctrl-C again; SIGTERM may come from several sides
        impatient = self.asked and number == signal.SIGINT
        if not self.waits or impatient:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def begin(settings, device):
    """Seeds torch and says on which commit and machine the run runs. -> these facts, a dict"""
    keep_freed_memory()
    gc.freeze()  # the imports' objects stay: Python need not look through them for garbage in every few steps
    torch.manual_seed(settings.seed)
    if settings.deterministic:
        # cuBLAS asks for it
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(settings.deterministic)
    about = dict(commit=commit(), torch=str(torch.__version__), python=platform.python_version(),
                 device=device_name(device), processes=rank_and_world()[1], threads=torch.get_num_threads(),
                 seed=settings.seed)
    print(' | '.join(f'{key} {value}' for key, value in about.items()))
    return about


# ----------------------------------------------------------------------------
# the checkpoint

def save(out_dir, checkpoint, run, parts):
    """Writes out_dir/ckpt.pt: `checkpoint`, which stays the same, `run`, and the state of each part.

    Nobody goes on, or ends, before it is there.
    """
    run.wall_s = time.time() - run.started
    state = {name: part.state_dict() for name, part in parts.items()}

    def write(file):
        torch.save(checkpoint | dict(state=state, run=vars(run)), file)

    def write_checkpoint():
        write_whole(Path(out_dir) / 'ckpt.pt', write)

    in_turn(write_checkpoint)


def read_checkpoint(out_dir, unfinished=False):
    """Reads out_dir/ckpt.pt, tensors and plain types only; nothing in it is run.

    Raises: FileNotFoundError without one; ValueError when it is of another kind or format or, unless
        `unfinished`, before the first validation.
    """
    path = Path(out_dir) / 'ckpt.pt'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; a run writes it: '
                                f'python train.py config/trm.py --out_dir={out_dir}, or python -m align')
    checkpoint = safe_load(path)
    found = checkpoint.get('format') if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        about = checkpoint.get('environment') if isinstance(checkpoint, dict) else None
        wrote = f', commit {about["commit"]}' if isinstance(about, dict) and 'commit' in about else ''
        raise ValueError(f'{path}: checkpoint format {found}, this code reads format {FORMAT}; '
                         f'train again, or use the code that wrote it{wrote}')
    if checkpoint['run']['best'] is None and not unfinished:
        raise ValueError(f'{path}: the run was stopped before its first validation: there are no weights to '
                         f'evaluate yet; the command that began it goes on')
    return checkpoint


def saved_run(settings, free, stage):
    """The checkpoint to go on from, or None. `free` settings may differ from those that it began with, and so
    may the paths of what has a fingerprint, which `unchanged` compares.

    Raises: ValueError when out_dir holds a run of another stage or with other settings.
    """
    saved = None
    if not settings.fresh and (Path(settings.out_dir) / 'ckpt.pt').is_file():
        saved = read_checkpoint(settings.out_dir, unfinished=True)
        # what is newer had its default's effect, or that of LATER
        before = asdict(type(settings)()) | LATER | saved['settings']
        ended = saved['run']['step'] >= before['max_steps']
        if ended and settings.max_steps > before['max_steps']:  # it goes on from where it ended
            free = (*free, 'max_steps')
        other = [f'{key}={before[key]} there, {value} here' for key, value in asdict(settings).items()
                 if key not in free and f'{key}_fingerprint' not in saved and before[key] != value]
        if saved['stage'] != stage:
            other = [f'stage={saved["stage"]} there, {stage} here']
        if other:
            raise ValueError(f'{settings.out_dir} holds a run with other settings ({"; ".join(other)}): '
                             f'choose another --out_dir, or start over with --fresh=true, which deletes it')
    if len(set(from_all(saved and saved['run']['step']))) > 1:
        raise ValueError(f'out_dir={settings.out_dir}: the processes do not all see the same run there; '
                         f'it must lie on a disk that they share')
    return saved


def source_of(path, saved, key):
    """The path or name of what a run reads; where that is from the hub, at the revision that it began with.
    `saved`: its checkpoint or None, key: encoder or trunk."""
    if saved and path == saved['settings'][key]:
        return saved.get(f'{key}_source') or path
    return path


def unchanged(settings, saved, key, fingerprint):
    """Raises: ValueError where a run that goes on finds another dataset or encoder, wherever it lies."""
    if saved and saved[f'{key}_fingerprint'] != fingerprint:
        raise ValueError(f'{key}={getattr(settings, key)}: not the one that the run in {settings.out_dir} '
                         f"began with, {saved['settings'][key]} (another fingerprint): choose another "
                         f'--out_dir, or start over with --fresh=true, which deletes that run')


def put_back(saved, parts, started):
    """Gives every part the state that it had. -> the Run, as far as it was"""
    defaults = parts['optimizer 0'].defaults
    for group in saved['state']['optimizer 0']['param_groups']:  # older code may have begun the run
        group |= {key: defaults[key] for key in ('fused', 'capturable')}
    for name, part in parts.items():
        part.load_state_dict(saved['state'][name])
    return Run(**saved['run'] | dict(started=started - saved['run']['wall_s']))


def read_start(folder):
    """The checkpoint of another run, whose decoder and tokenizer a run starts from. Raises: ValueError."""
    start = read_checkpoint(folder)
    if start['stage'] != 'answer':
        raise ValueError(f"init_from={folder}: a run of stage '{start['stage']}', which has no decoder; "
                         f"--encoder={folder}/encoder.pt takes its encoder")
    best = start['run']['best']
    print(f"starting from {folder}: its decoder after {best['step']} steps "
          f"(validation em {best['scores']['em']:.3f}) and its tokenizer")
    return start


def start_from(start, model, fingerprints):
    """Gives the parts of a model the best weights of another run. `fingerprints`: of the encoders that this
    run has, by the names of their settings; None of one with new weights. Raises: ValueError."""
    folder = start['settings']['out_dir']
    remedies = dict(encoder='give --train_encoder=true', sound_encoder='give --sound_encoder=None')
    for name, fingerprint in fingerprints.items():
        if name in start['run']['best'] and name not in model:
            raise ValueError(f'init_from: {folder} trained its {name} along; {remedies[name]}, which starts '
                             'from that one')
        if name not in start['run']['best'] and start.get(f'{name}_fingerprint') not in (None, fingerprint):
            print(f"its tokens came from another {name}, {start['settings'][name]}: the decoder has to learn "
                  'these anew')
    for name, part in model.items():
        weights = start['run']['best'].get(name)
        if weights is None:  # its encoder was frozen: this run's own file has it
            continue
        other = other_weights(part, weights)
        if other:
            raise ValueError(f'init_from: the {name} of {folder} has other weights ({", ".join(other[:4])}): '
                             f'its settings of the model and these must agree, use_vision and use_sound too')
        part.load_state_dict(weights)
    ours = asdict(model['decoder'].config)
    theirs = decoder_settings(start)
    passed_again = all(c['kind'] == 'trm' and c['recursion'] != 'add' for c in (ours, theirs))
    # of the same shapes, and yet of another meaning
    for key in ('n_head', 'norm', 'qk_norm', 'rope_freqs', 'norm_eps', *(['recall'] if passed_again else [])):
        if theirs.get(key, ours[key]) != ours[key]:
            raise ValueError(f'init_from: {folder} was trained with {key}={theirs[key]}, here it is '
                             f'{ours[key]}; give --{key}={theirs[key]}')


def decoder_settings(checkpoint):
    """The settings of the decoder of a run, those included that came after it."""
    return LATER | checkpoint['model_config']


def other_weights(module, weights):
    """The names of weights that the one has and the other has not, or has in another shape."""
    ours = module.state_dict()
    other = sorted(ours.keys() ^ weights.keys())
    return other + [key for key in ours if key in weights and ours[key].shape != weights[key].shape]


def say_where(settings, saved, learning_rate):
    """Says where a run goes on and, where it had ended, what its learning rate does: a function of (step,
    settings)."""
    step = saved['run']['step']
    ended = saved['settings']['max_steps']
    if ended == settings.max_steps:
        print(f'going on at step {step}', flush=True)
        return
    then = learning_rate(ended, replace(settings, max_steps=ended))
    now = learning_rate(ended, settings)
    print(f'going on after step {step}, where the run ended, up to {settings.max_steps}: the learning rate '
          f'was {then:.1e} and is {now:.1e} now, what a run of that length has there', flush=True)


def end_early(run, settings):
    """Raises: KeyboardInterrupt, always, that says where a run that was asked to stop stands."""
    fresh = ' without --fresh' if settings.fresh else ''
    raise KeyboardInterrupt(f'stopped at step {run.step} of {settings.max_steps}, which is saved; '
                            f'the same command{fresh} goes on from there')


def read_results(done, loss_names, run, log, allowed, save_now):
    """Waits for the device, and counts the steps that were done since the last time, or says that they were
    bad and skipped.

    done: of every step a dict of step, lr, n_rows, names of some rows, and results, (n,) on the device: the
        losses, whether to stop, norm of the gradient, whether the step was bad; emptied
    -> whether any process was asked to stop
    Raises: FloatingPointError after more than `allowed` bad steps, with the state before the last one saved.
    """
    results = torch.stack([of_step.pop('results') for of_step in done]).tolist()
    for of_step, (*losses, asked, gnorm, bad) in zip(done, results):
        if not bad:
            run.count(dict(zip(loss_names, losses)), gnorm, of_step['n_rows'])
            continue
        values = f"loss {sum(losses)}, gradient norm {gnorm}, lr {of_step['lr']:.2e}"
        names = ', '.join(of_step['names'])
        problem = printable(f"step {of_step['step']}: {values}: not finite; samples {names}, ...")
        if run.bad_steps >= allowed:
            run.step = of_step['step']  # the device has moved nothing since
            save_now()
            raise FloatingPointError(f'{problem}; the state before this step is saved; '
                                     f'a lower --learning_rate with --fresh=true is the usual remedy, '
                                     f'--skip_bad_steps={run.bad_steps + 10} leaves such steps out')
        run.bad_steps += 1
        print(f'{problem}; left out')
        log.write(dict(event='bad step', step=of_step['step'] + 1, problem=problem))
    done.clear()
    return asked > 0  # a mean over the processes: one is enough


# ----------------------------------------------------------------------------
# the log

class Log:
    """One line an event: on the console, in log.jsonl and, if asked for, on Weights & Biases."""

    STYLE = dict(loss='loss {:.4f}', lr='lr {:.2e}', gnorm='gnorm {:.2f}', ms='{:.1f} ms',
                 examples_per_s='{:.0f} ex/s')

    def __init__(self, path, run, settings, about):
        self.path = path
        self.max_steps = settings.max_steps
        self.started = time.time()
        self.first = run.step
        self.wandb = None
        if settings.fresh and rank_and_world()[0] == 0:
            for name in FILES:
                (path.parent / name).unlink(missing_ok=True)
        self.keep_until(run)
        if settings.wandb and rank_and_world()[0] == 0:
            import wandb
            self.wandb = wandb.init(project='nano-trm-vlm', name=path.parent.name, config=asdict(settings))
        self.write(dict(event='start', step=run.step, **about))

    def keep_until(self, run):
        """Drops what a killed process logged after its last checkpoint, and lines of an older run."""
        kept = []
        if run.step and self.path.is_file():
            for line in self.path.read_text().splitlines():
                event, step = event_of(line)
                if step <= (run.validated if event == 'eval' else run.step):
                    kept.append(line)

        def write(file):
            file.writelines(line.encode() + b'\n' for line in kept)

        write_whole(self.path, write)

    def write(self, event):
        if rank_and_world()[0]:
            return
        with open(self.path, 'a') as f:
            f.write(json.dumps(event) + '\n')
        if self.wandb and event['event'] != 'start':
            numbers = {f"{event['event']}/{key}": value for key, value in event.items()
                       if isinstance(value, (int, float))}
            self.wandb.log(numbers, step=event['step'])

    def line(self, step, values, event='step'):
        """Writes an event and prints it, with the time that is left."""
        self.write(dict(event=event, step=step, **values))
        shown = [self.STYLE.get(key, key + ' {:.3f}').format(value) for key, value in values.items()
                 if key not in ('train_s', 'metric')]
        eta = (time.time() - self.started) / max(1, step - self.first) * (self.max_steps - step)
        print(' | '.join([f'{event} {step}/{self.max_steps}', *shown, f'eta {clock(eta)}']), flush=True)

    def step(self, run, lr):
        """The line of the good steps since the last one. -> their mean losses, a dict"""
        run.train_s += run.since_s
        means = {key: value / run.since for key, value in run.total.items()}
        several = means if len(means) > 1 else {}
        self.line(run.step, dict(loss=sum(means.values()), **several, lr=lr, gnorm=run.gnorm,
                                 ms=1e3 * run.since_s / run.since, examples_per_s=run.rows / run.since_s,
                                 train_s=run.train_s))
        run.total = {}
        run.since = 0
        run.since_s = 0.0
        run.rows = 0
        return means

    def nothing_learnt(self, step, name, loss, chance):
        """Says that a loss has not fallen below what a guess costs."""
        print(f'step {step}: the loss {name} is {loss:.3f} and was to fall below {chance:.3f}, '
              f'what a guess costs: nothing is learnt yet; a lower --learning_rate is the usual remedy')


def event_of(line):
    """-> event and step of a log line; of one that was torn when the machine went down, None and infinity."""
    try:
        event = json.loads(line)
        return event['event'], event['step']
    except (ValueError, LookupError, TypeError):
        return None, math.inf


def read_log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]


def validation_curve(out_dir):
    """-> [(step, seconds of training until then, Exact Match), ...] of a run's validations."""
    curve = []
    seconds = 0.
    for event in read_log(out_dir):
        seconds = event.get('train_s', seconds)
        if event['event'] == 'eval':
            curve.append((event['step'], seconds, event['em']))
    return curve
