"""How large and how fast: parameters, FLOPs, time of a training step, generation, memory, the encoder.

    python -m lab.bench"""
import io
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from configurator import configure
from lab.naive import naive_generate, naive_logits
from model import ModelConfig, build_model, cross_entropy
from plumbing.console import run_script, table
from plumbing.machine import fast_dtypes, flops_of, keep_freed_memory, most_memory, pick_device, seconds
from plumbing.pictures import open_picture


@dataclass
class BenchConfig:
    # the defaults are the scale of Edge-Glass: PixMo, GPT-2's vocabulary, 64 image tokens of 4096 dimensions
    n_layer: int = 2         # blocks in F
    n_head: int = 8          # attention heads
    n_embd: int = 512        # width
    inner_steps: int = 4     # steps of a cycle
    outer_steps: int = 1     # cycles
    vocab_size: int = 50257  # size of the vocabulary
    vision_dim: int = 4096   # dimensions of an image token
    n_image: int = 64        # image tokens
    n_question: int = 20     # question tokens
    n_answer: int = 32       # answer tokens
    batch_size: int = 32     # rows
    repeats: int = 3         # rounds of timing; every figure is the fastest of them
    peak_size: int = 4096    # side of the matrices whose product shows the peak of the machine
    memory: bool = False     # print the memory of a training step, by steps, with and without checkpoint_recursion, and stop
    profile: bool = False    # print the costliest operations of a training step of concat, and stop
    compile: bool = False    # time a compiled training step too (torch.compile; with CUDA graphs on a GPU)
    device: str = 'auto'     # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        for key, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f'{key}={value}: expected at least 1')


def bench_decoder(b, **settings):
    """A decoder of the benchmark's scale and a batch for it: (vision, question, answer, targets), all tokens real."""
    torch.manual_seed(0)
    scale = {key: getattr(b, key) for key in ('n_layer', 'n_head', 'n_embd', 'inner_steps', 'outer_steps', 'vocab_size', 'vision_dim')}
    decoder = build_model(ModelConfig(**scale | dict(eos_id=-1) | settings)).to(b.device)  # no end token: answers get their whole length
    token = lambda length: torch.randint(3, b.vocab_size, (b.batch_size, length), device=b.device)
    answer = token(b.n_answer)
    return decoder, (torch.randn(b.batch_size, b.n_image, b.vision_dim, device=b.device), token(b.n_question), answer, answer.roll(-1, dims=1))


def bench_run(b, name, loop, dtype, decoder, batch):
    """One line of the benchmark: what to time, and the FLOPs of it, counted."""
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(b.device.split(':')[0], dtype, enabled=dtype != torch.float32)

    def loss(forward):
        with autocast:
            if loop == 'naive':
                return cross_entropy(naive_logits(decoder, *batch[:3]), batch[3])
            return forward(*batch)[1]

    def step(forward):
        loss(forward).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def write(length=b.n_answer):
        with autocast:
            generate = partial(naive_generate, decoder) if loop == 'naive' else decoder.generate
            generate(*batch[:2], length)

    flops, forward = [flops_of(partial(function, decoder)) for function in (torch.no_grad()(loss), step)], decoder
    if loop == 'compiled':
        forward = torch.compile(decoder, mode='reduce-overhead')       # static shapes; on a GPU with CUDA graphs
        for _ in range(3):  # compile, warm up, record
            step(forward)
    else:
        write(2)
    return dict(name=name, loop=loop, dtype=dtype, step=partial(step, forward), write=write, flops=flops)


def benchmark(b):
    """Prints parameters, FLOPs, time of a training step and generation speed for plain, concat and add, beside the naive loop."""
    dtypes, peaks = fast_dtypes(b.device), {}
    for dtype in dtypes:
        m = torch.randn(b.peak_size, b.peak_size, device=b.device, dtype=dtype)
        peaks[dtype] = 2 * b.peak_size ** 3 / min(seconds(lambda: m @ m, b.device) for _ in range(4))
    print(' | '.join(f'{str(dtype)[6:]} peak {p / 1e9:.0f} GFLOP/s' for dtype, p in peaks.items()), f'(a product of matrices of side {b.peak_size})')

    runs, rows = [], []
    for name, settings in (('plain', dict(kind='plain', n_layer=2 * b.n_layer)), ('concat', {}), ('add', dict(recursion='add'))):
        decoder, batch = bench_decoder(b, **settings)
        rows.append([name, *(f'{n / 1e6:.2f} M' for n in decoder.parameter_counts().values())])
        loops = [('naive', torch.float32)] + [(loop, dtype) for dtype in dtypes for loop in ['cached'] + ['compiled'] * b.compile]
        runs += [bench_run(b, name, loop, dtype, decoder, batch) for loop, dtype in loops]
    print(table(['parameters', *decoder.parameter_counts()], rows))

    for k in range(b.repeats):  # side by side: a round times everything once, but for the naive loop's generation, timed once in all
        for run in runs:
            run['step_s'] = min(run.get('step_s', math.inf), seconds(run['step'], b.device))
            if run['loop'] == 'cached' or run['loop'] == 'naive' and k == 0:
                run['write_s'] = min(run.get('write_s', math.inf), seconds(run['write'], b.device))
    naive, rows = {run['name']: run for run in runs if run['loop'] == 'naive'}, []
    for run in runs:
        slow, (forward, step) = naive[run['name']], run['flops']
        rows.append([run['name'], run['loop'], str(run['dtype'])[6:], f'{forward / 1e9:.4g}', f'{step / 1e9:.4g}', f"{1e3 * run['step_s']:.4g}",
                     f"{slow['step_s'] / run['step_s']:.1f}", f"{100 * step / run['step_s'] / peaks[run['dtype']]:.0f} %",
                     *((f"{b.batch_size * b.n_answer / run['write_s']:.0f}", f"{slow['write_s'] / run['write_s']:.1f}") if 'write_s' in run else '--')])
    print(table(['decoder', 'loop', 'dtype', 'GFLOP forward', 'GFLOP step', 'ms step', 'speed-up', 'MFU', 'tokens/s written', 'speed-up'], rows))


def show_profile(b, most=8):
    """Prints the costliest operations of a training step of concat, in the fastest dtype."""
    decoder, batch = bench_decoder(b)
    step = bench_run(b, 'concat', 'compiled' if b.compile else 'cached', fast_dtypes(b.device)[-1], decoder, batch)['step']
    step()  # it asks for memory that is not there yet
    with torch.profiler.profile() as profiler:
        step()
    own = lambda event: event.self_device_time_total if b.device.startswith('cuda') else event.self_cpu_time_total  # microseconds
    events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]  # operations; a GPU's kernels, whose time they have, are listed too
    events.sort(key=own, reverse=True)
    total = sum(map(own, events))
    print(table(['operation', 'calls', 'ms', 'share'], [[e.key[:60], e.count, f'{own(e) / 1e3:.1f}', f'{own(e) / total:.0%}'] for e in events[:most]]))


def show_memory(b, steps=(1, 2, 4, 8, 16)):
    """Prints how much memory a forward and backward pass adds to the weights, gradients included, each in a process of its own."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    rows = []
    for n in steps:
        row = [n]
        for recompute in (False, True):
            with ProcessPoolExecutor(1, get_context('spawn')) as pool:
                row.append(f'{pool.submit(peak_memory, replace(b, inner_steps=n), recompute).result() / 2 ** 20:.0f}')
        rows.append(row)
    print(table(['steps', 'MiB, all kept', 'MiB, checkpoint_recursion'], rows))


def peak_memory(b, recompute):
    """Bytes that a forward and a backward pass add to the most that the process has used so far."""
    decoder, batch = bench_decoder(b, checkpoint_recursion=recompute)
    torch.ones(8, 8, device=b.device) @ torch.ones(8, 8, device=b.device)  # a GPU's library takes its own memory with the first product
    before = most_memory(b.device)
    decoder(*batch)[1].backward()
    return most_memory(b.device) - before


def bench(encoder, n, device):
    """Prints how many pictures per second are decoded and encoded, and the most memory that took: n photographs of noise, 1024 x 768."""
    rng, files = np.random.default_rng(0), []
    for _ in range(n):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((1024, 768), Image.BICUBIC).save(buffer, 'JPEG', quality=90)
        files.append(buffer.getvalue())
    with ThreadPoolExecutor() as pool:
        took = seconds(lambda: list(pool.map(lambda data: encoder.pixels(open_picture(data)), files)), device)
    print(f'decoding, all cores: {n / took:.1f} pictures/s')
    pixels = encoder.pixels(open_picture(files[0]))
    for dtype in (torch.float32, torch.bfloat16):
        images = encoder.normalise(torch.stack([pixels] * min(n, 32)).to(device))
        with torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32):
            encoder.encode_images(images[:1])
            took = min(seconds(lambda: encoder.encode_images(images), device) for _ in range(2))
        print(f'encoding, {str(dtype)[6:]}: {len(images) / took:.2f} pictures/s, {len(images)} at once')
    print(f'at most {most_memory(device) / 1e9:.1f} GB of memory; a picture takes {2e-6 * encoder.encode_images(images[:1]).numel():.2f} MB of the cache')


def main(argv=None):
    settings, _ = configure(BenchConfig, sys.argv[1:] if argv is None else argv, '-m lab.bench')
    keep_freed_memory()
    settings.device = pick_device(settings.device)
    (show_memory if settings.memory else show_profile if settings.profile else benchmark)(settings)


if __name__ == '__main__':
    run_script(main)
