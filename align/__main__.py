"""
Stage 1: the encoder learns from captions; from then on it is frozen.

    python -m align config/align.py          # the small encoder of the shapes, from drawn captions
    python -m align config/align_pixmo.py    # a resampler after a frozen CLIP, from the captions of a dataset
    python -m align config/align_photos.py   # on photographs of one's own
    torchrun --standalone --nproc_per_node=4 -m align config/align.py

The same command goes on where a stopped or killed run stood. The folder gets encoder.pt, which train.py takes
as --encoder; `python -m align.judge --out_dir=out/align` reports on it again.
"""

import copy
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from align.captions import AlignData
from align.config import AlignConfig
from align.judge import report, validate
from align.model import build, chosen, open_trunk, start_from
from configurator import configure, echo
from encoder import load_encoder, save_encoder
from plumbing.console import GOES_ON, clock, run_script, say_if_few
from plumbing.files import locked, write_whole
from plumbing.machine import autocast_to, compile_layers, most_memory, on_device, pick_dtype, pinned
from plumbing.optimizers import Guard, follow, make_optimizers, set_learning_rate, update
from plumbing.plots import draw_curves
from plumbing.ranks import all_reduce, in_turn, processes, rank_and_world
from plumbing.run import (
    FORMAT,
    Log,
    Run,
    Stop,
    begin,
    end_early,
    put_back,
    read_results,
    save,
    saved_run,
    say_where,
    unchanged,
)
from plumbing.steps import Ahead, batches_of_step
from train import FREE, ema_rate, is_due, learning_rate, reads_results


def main(argv=None):
    s, sources = configure(AlignConfig, sys.argv[1:] if argv is None else argv, '-m align')
    with processes(s) as device, Stop() as stop:
        first = rank_and_world()[0] == 0
        with locked(Path(s.out_dir) / '.lock') if first else nullcontext():
            align(s, sources, device, stop)


def align(s, sources, device, stop):
    """The whole story of a run, from its settings to its result."""
    # ---- the run
    run = Run(started=time.time())
    out_dir = Path(s.out_dir)
    saved = saved_run(s, FREE, stage='align')
    about = begin(s, device)
    print(echo(s, sources))

    # ---- captions, model, pictures
    data = AlignData(s, saved)
    unchanged(s, saved, 'dataset', data.rows_sum)
    batch_size = data.fitting(s.batch_size, world=rank_and_world()[1])
    say_if_few(data.n_pictures('val'), f'{s.reads}s')
    trunk = open_trunk(s, saved, device)
    fingerprint = trunk.fingerprint() if trunk else None
    unchanged(s, saved, 'trunk', fingerprint)
    model = build(s, data.tokenizer.vocab_size, trunk)
    if s.init_from and not saved:
        start_from(s.init_from, model.encoder)
    data.open_pictures(trunk, model.encoder, device)

    # ---- optimizers; the average of the weights is what is judged
    model = model.to(device)
    average = copy.deepcopy(model).requires_grad_(False).eval() if s.ema or s.compile else model
    if s.compile:
        compile_layers(model, device)  # only what is trained, not what is judged
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers([(1.0, model)], s)
    dtype = pick_dtype(s.dtype, device)
    autocast = autocast_to(dtype, device)
    guard = Guard(device, dtype, s.skip_bad_steps)
    counts = parameter_counts(model, trunk)
    # what a guess costs, in nats: one caption of a batch, one word of all
    chance = chosen(s, dict(contrast=math.log(batch_size), cloze=math.log(data.tokenizer.vocab_size)))
    print('parameters | ' + ' | '.join(f'{name} {n:,}' for name, n in counts.items()))
    print(f'up to {batch_size * s.grad_accum} examples per step | '
          f'expected loss at the start {sum(chance.values()):.2f}')

    # ---- go on where a stopped run stood
    parts = dict(model=model, ema=average, scaler=guard)  # by the names that checkpoints have
    parts |= {f'optimizer {k}': optimizer for k, optimizer in enumerate(optimizers)}
    if saved:
        run = put_back(saved, parts, run.started)
        guard.allow(s.skip_bad_steps - run.bad_steps)
        say_where(s, saved, learning_rate)
    checkpoint = dict(format=FORMAT, stage='align', settings=asdict(s), environment=about,
                      encoder_config=asdict(model.encoder.config), tokenizer=data.tokenizer.state,
                      dataset_fingerprint=data.rows_sum, trunk_fingerprint=fingerprint,
                      trunk_source=trunk.source if trunk else None)
    log = Log(out_dir / 'log.jsonl', run, s, dict(**about, parameters=counts, settings=asdict(s)))

    # ---- a step
    def learn(given):
        """Forward, losses, backward, update. given: [the batches, (3,): learning rate, rate of the average,
        1.0 where this process was asked to stop]
        Shapes: -> (losses + 3,): every loss, whether any process was asked to stop, norm of the gradient,
            whether the step was bad"""
        batches, numbers = on_device(given, device)
        lr, rate, asked = numbers                                      # () each
        losses = {name: 0 for name in chance}
        for batch in batches:
            with autocast:
                tokens = data.encode(model.encoder, batch, 'train')                        # (B, N, D)
                terms = model(tokens, batch['caption'], batch['left_out'])
                # a process may have drawn fewer gaps than another
                terms['cloze'] = terms['cloze'] * batch.get('weight', 1)
                terms = chosen(s, terms)
            guard.scaled(sum(terms.values()) / s.grad_accum).backward()
            for name, term in terms.items():
                losses[name] = losses[name] + term.detach() / s.grad_accum
        *means, asked = all_reduce(parameters, torch.stack([*losses.values(), asked]))
        set_learning_rate(optimizers, lr)
        gnorm, skip, bad = update(parameters, optimizers, guard, sum(means), s.grad_clip)
        follow(average, model, rate * (1 - skip))
        return torch.stack([*means, asked, gnorm, bad])

    # ---- the loop
    batches_ahead = Ahead(partial(batches_of_step, draw=partial(draw, data=data, batch_size=batch_size, s=s),
                                  fetch=data.fetch, s=s, device=device), s.max_steps)
    save_now = partial(save, out_dir, checkpoint, run, parts)
    done = []  # steps whose results have not been read
    mark = time.time()
    warned = False
    stopping = False
    stop.waits = True
    while True:
        if is_due(run.step, s) and run.validated < run.step:
            scores = validate(average, data, s, device, 'val')
            log.line(run.step, dict(**scores, train_s=run.train_s + run.since_s, metric='R@1'), event='eval')
            if run.best is None or scores['loss'] <= run.best['scores']['loss']:
                run.best = dict(step=run.step, scores=scores, model=copy.deepcopy(average.state_dict()))
            run.validated = run.step
            save_now()
            mark = time.time()  # the clock of the log lines stands still while evaluating
        if stopping:
            end_early(run, s)
        if run.step >= s.max_steps:
            break

        batches, names, n_rows = batches_ahead(run.step)
        lr = learning_rate(run.step, s)
        numbers = torch.tensor([lr, ema_rate(run.step, s), stop.asked])        # (3,)
        results = learn([batches, pinned(numbers, device)])            # (losses + 3,)
        done.append(dict(step=run.step, lr=lr, names=names, n_rows=n_rows, results=results))
        run.step += 1
        if reads_results(run.step, s, device, stop):
            stopping = read_results(done, chance.keys(), run, log, s.skip_bad_steps, save_now)
        run.since_s += time.time() - mark
        mark = time.time()

        if run.since and (run.step % s.log_interval == 0 or run.step == s.max_steps):
            means = log.step(run, lr)
            for name, guess in chance.items():
                if run.step >= 100 and not warned and means.get(name, 0) > guess - .01:
                    warned = True
                    log.nothing_learnt(run.step, name, means[name], guess)

        # before validating too: whatever ends that costs no step
        if stopping or is_due(run.step, s):
            save_now()
    stop.waits = False
    if stop.asked:
        raise KeyboardInterrupt('stopped before the evaluation, training is saved; '
                                'the same command goes on from there')

    # ---- the result on the test split, opened only now, with the weights that validation found best
    average.load_state_dict(run.best['model'])
    print(f"best validation R@1 {run.best['scores']['R@1']:.3f} at step {run.best['step']}")
    run.wall_s = time.time() - run.started
    facts = run.facts(device) | dict(parameters=counts, **about, settings=asdict(s))
    finish(average, trunk, data, s, device, facts)
    print(f'{out_dir}: done after {clock(time.time() - run.started)}, '
          f'at most {most_memory(device) / 1e9:.2f} GB of memory')


# ----------------------------------------------------------------------------
# what the story leans on

def draw(k, data, batch_size, s):
    """-> the k-th batch of a run, and names of some of its rows."""
    batch = data.batch('train', k, batch_size, s.seed)
    batch['counted'] = batch['left_out']  # the words that the cloze is a mean of
    return batch, batch.pop('names')


def parameter_counts(model, trunk):
    total = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    counts = dict(encoder=encoder, text=total - encoder, total=total)
    if trunk:
        counts['frozen trunk'] = sum(p.numel() for p in trunk.parameters())
    return counts


def finish(model, trunk, data, s, device, facts):
    """Writes encoder.pt, the trunk included, and reports on the test split."""
    out_dir = Path(s.out_dir)
    if trunk:
        model.encoder.trunk = trunk.trunk

    def write_encoder():
        save_encoder(model.encoder, out_dir / 'encoder.pt')

    in_turn(write_encoder)
    model.encoder = load_encoder(out_dir / 'encoder.pt').to(device)  # what was written is what is judged
    metrics = facts | report(model, data, s, device, 'test')

    def write_metrics(file):
        file.write(json.dumps(metrics, indent=1).encode())

    write_whole(out_dir / 'metrics.json', write_metrics)
    draw_curves(out_dir)


if __name__ == '__main__':
    run_script(main, GOES_ON)
