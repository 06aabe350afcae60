"""
The states of the recursion: how large they are, and what they carry from one pass to the next.

    python -m lab.states --out_dir=out/trm              # RMS of y and z over 64 passes
    python -m lab.states --out_dir=out/trm --forget=z   # the test split, with z set back before every pass
    python -m lab.states --fresh=true                   # sizes and gradients of untrained decoders
"""

import copy
import sys
from dataclasses import dataclass

import torch

from configurator import configure
from eval import evaluate, load_run, questions_to_judge, set_depth
from lab.bench import BenchConfig, bench_decoder
from plumbing.console import run_script, table
from plumbing.features import ContextTokens
from plumbing.machine import on_device, pick_device
from plumbing.results import result_table
from plumbing.run import read_checkpoint

MARKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class StatesConfig:
    out_dir: str = 'out/trm'        # the run to look into
    split: str = 'test'             # train, val or test
    dataset: str | None = None      # another dataset folder than the one of the run
    encoder: str | None = None      # where the encoder of the run lies now
    forget: str | None = None       # y or z: evaluate with it set back to its start before every pass
    fresh: bool = False             # untrained decoders of each recursion and norm, instead of a run
    inner_steps: int | None = None  # with forget: another number of passes than in training
    batch_size: int = 256           # rows at a time
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.forget not in (None, 'y', 'z'):
            raise ValueError(f'forget={self.forget}: expected y or z')
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')
        if self.batch_size < 1:
            raise ValueError(f'batch_size={self.batch_size}: expected at least 1')
        if self.forget and self.fresh:
            raise ValueError('--forget and --fresh: one at a time; untrained decoders answer nothing')
        if self.inner_steps is not None and not self.forget:
            raise ValueError('--inner_steps goes with --forget; the sizes are those of 64 passes')


def watch_passes(decoder):
    """Notes what goes into F and what comes out, from now on.

    -> a list that gets a pair for every pass: states in, states out
    """
    network = decoder.network
    passes = []

    def watched(states, *rest, **more):
        after = network(states, *rest, **more)
        passes.append((states, after))
        return after

    decoder.network = watched
    return passes


def rms(h):
    return h.float().square().mean().sqrt().item()


def state_sizes(decoder, vision, question, answer, sound=None, steps=64):
    """RMS of what every pass of F hands on, in one long cycle.

    Shapes: as `Decoder.forward` -> a tuple for each pass: (RMS of y, RMS of z) with recursion='concat', else
    (RMS of the state that the pass makes,), which with 'add' is z's, and y's in the last pass.
    Raises: ValueError if plain.
    """
    if decoder.config.kind == 'plain':
        raise ValueError('a plain decoder has no recurrent states')
    decoder = copy.deepcopy(decoder)
    decoder.config.inner_steps = steps
    decoder.config.outer_steps = 1
    passes = watch_passes(decoder)
    with torch.no_grad():
        decoder.answer_states(decoder.read_context(vision, question, sound), answer)
    sizes = []
    for _, after in passes:
        streams = after.chunk(decoder.config.streams, dim=1)           # (B, A, C) each
        sizes.append(tuple(rms(stream) for stream in streams))
    return sizes


def forgetful(decoder, which):
    """Makes every pass of [y ; z] begin with the y, or the z, that the first one had: what the other one
    carries must then do. Raises: ValueError where y and z do not go through F together."""
    if decoder.config.recursion != 'concat' or decoder.config.has_gates:
        raise ValueError('--forget: a decoder whose passes have no y and z side by side, or gates that mix '
                         "them; expected recursion='concat'")
    network = decoder.network
    answer_states = decoder.answer_states
    start = []  # y and z of the first pass

    def begin(*args, **more):
        start.clear()
        return answer_states(*args, **more)

    def forget(states, *rest, **more):
        y, z = states.chunk(2, dim=1)                                  # (B, A, C) both
        if not start:
            start.extend([y, z])
        if which == 'y':
            y = start[0]
        elif which == 'z':
            z = start[1]
        else:
            raise ValueError(f'forget={which}: expected y or z')
        return network(torch.cat([y, z], dim=1), *rest, **more)

    decoder.network = forget
    decoder.answer_states = begin


def show_fresh(b, marks=(1, 4, 16, 64), depths=(4, 8, 16)):
    """Prints sizes of fresh states, and of gradients, for both recursions with z and both norms."""
    rows = []
    for recursion in ('concat', 'add'):
        for placement in ('pre', 'post'):
            decoder, batch = bench_decoder(b, recursion=recursion, norm=placement)
            sizes = state_sizes(decoder, *batch[:3], steps=max(marks))
            row = [recursion, placement, *(f'{sizes[n - 1][-1]:.2f}' for n in marks), f'{sizes[-1][0]:.2f}']
            for n in depths:
                decoder.config.inner_steps = n
                decoder.zero_grad()
                decoder(*batch)[1].backward()
                norms = torch.stack([p.grad.norm() for p in decoder.blocks.parameters()])
                row.append(f'{norms.norm().item():.2f}')
            rows.append(row)
    head = ['recursion', 'norm', *(f'z after {n}' for n in marks), f'y after {marks[-1]}']
    print(table(head + [f'gradient at n={n}' for n in depths], rows))


def main(argv=None):
    s, _ = configure(StatesConfig, sys.argv[1:] if argv is None else argv, '-m lab.states')
    device = pick_device(s.device)
    if s.fresh:
        show_fresh(BenchConfig(device=device))
        return
    checkpoint = read_checkpoint(s.out_dir)
    run = checkpoint['settings']
    decoder, encoders, tokenizer = load_run(checkpoint, device, s.encoder)
    set_depth(decoder, s.out_dir, s.inner_steps, None)
    questions = questions_to_judge(run, s.dataset, s.split, tokenizer)
    tokens_of = ContextTokens(run, encoders, questions.rows, device)
    if s.forget:
        forgetful(decoder, s.forget)
        print(result_table(evaluate(decoder, questions, tokens_of, device, s.batch_size)[0]))
        return
    batch = on_device(questions.batch(next(questions.rows_in_order(s.batch_size))), device)
    vision, sound = tokens_of(batch)
    sizes = state_sizes(decoder, vision, batch['question'], batch['answer'], sound)
    for n in MARKS:
        names = ('y', 'z') if decoder.config.streams == 2 else ('its state',)
        known = [f'RMS of {name} {size:.2f}' for name, size in zip(names, sizes[n - 1])]
        print(f'after pass {n:2}: ' + ', '.join(known))


if __name__ == '__main__':
    run_script(main)
