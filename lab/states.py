"""The states of the recursion: how large they are, and what they carry from one pass to the next.

    python -m lab.states --out_dir=out/trm"""
import copy
from itertools import cycle

import torch

from lab.bench import bench_decoder
from plumbing.console import table


def state_sizes(decoder, vision, question, answer, steps=64):
    """RMS of the states after every step of one long cycle. Shapes: as `Decoder.forward` -> [(RMS of y, RMS of z), ...], `steps` of
    them; with recursion='add' y only moves at the end of the cycle, so all but the last y are None; with 'loop' there is no z. Raises: ValueError if plain."""
    if decoder.config.kind == 'plain':
        raise ValueError('a plain decoder has no recurrent states')
    rms = lambda h: h.float().square().mean().sqrt().item()
    decoder = copy.deepcopy(decoder)
    decoder.config.inner_steps, decoder.config.outer_steps, watch = steps, 1, []
    with torch.no_grad():
        decoder.answer_states(decoder.read_context(vision, question), answer, watch=watch)
    if decoder.config.recursion == 'loop':
        return [(rms(h), None) for h, _ in watch]
    if decoder.config.recursion == 'concat':
        return [tuple(rms(half) for half in h.chunk(2, dim=1)) for h, _ in watch]
    return [(None, rms(h)) for h, _ in watch[:-2]] + [(rms(watch[-1][0]), rms(watch[-2][0]))]


def show_states(b):
    """Prints the sizes of fresh states and gradients for the recursions concat and add with every norm, at the width of the benchmark."""
    rows, marks = [], (1, 4, 16, 64)
    for recursion in ('concat', 'add'):
        for placement in ('pre', 'post', 'unbounded'):
            decoder, batch = bench_decoder(b, recursion=recursion, norm=placement)
            sizes, grads = state_sizes(decoder, *batch[:3], steps=max(marks)), []
            for n in (4, 8, 16):
                decoder.config.inner_steps = n
                decoder.zero_grad()
                decoder(*batch)[1].backward()
                grads.append(torch.stack([p.grad.norm() for p in decoder.blocks.parameters()]).norm().item())
            rows.append([recursion, placement, *(f'{sizes[n - 1][1]:.2f}' for n in marks), f'{sizes[-1][0]:.2f}', *(f'{g:.2f}' for g in grads)])
    print(table(['recursion', 'norm', *(f'z after {n}' for n in marks), f'y after {marks[-1]}', *(f'gradient at n={n}' for n in (4, 8, 16))], rows))


def forgetful(decoder, which):
    """Makes every step of [y ; z] begin with the y, or the z, that the first one had: what the other state carries must then do."""
    first, start = cycle([True] + [False] * (decoder.config.calls - 1)), []

    def forget(block, args):
        h, rope, mask, *context = args
        if context:  # a step, not the pass over the context
            if next(first):
                start[:] = h.chunk(2, dim=1)
            y, z = h.chunk(2, dim=1)
            return torch.cat([start[0], z] if which == 'y' else [y, start[1]], dim=1), rope, mask, *context

    for block in decoder.blocks[::decoder.config.n_layer]:  # the first one of every step
        block.register_forward_pre_hook(forget)
