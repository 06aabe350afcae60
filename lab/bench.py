"""
How large and how fast: parameters, FLOPs, milliseconds of a training step, tokens a second, memory.

    python -m lab.bench                                        # plain, concat and add beside the naive loop
    python -m lab.bench --scale=main                           # a training step of config/trm.py
    python -m lab.bench --profile=true                         # the costliest operations of a training step
    python -m lab.bench --memory=true                          # memory of a training step, by passes
    python -m lab.bench --encoder=random --pictures=16         # an encoder of Edge-Glass' shapes
    python -m lab.bench --encoder=assets/encoder_shapes.pt     # the encoder of a file or folder
    python -m lab.bench --decoder=FOLDER --batch_size=4        # a pretrained decoder beside transformers
"""

import copy
import io
import math
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from configurator import configure
from encoder import EDGE_GLASS_CONFIG, Encoder, check_reads, load_encoder
from lab.decoders import compare_decoders
from lab.naive import naive_generate, naive_logits
from model import ModelConfig, build_model, cross_entropy
from plumbing.console import run_script, table
from plumbing.graphs import Captured, writer_of
from plumbing.machine import (
    autocast_to,
    compile_layers,
    fast_dtypes,
    flops_of,
    keep_freed_memory,
    most_memory,
    pick_device,
    seconds,
)
from plumbing.optimizers import Guard, follow, make_optimizers, set_learning_rate, update
from train import TrainConfig

SCALE = ('n_layer', 'n_head', 'n_embd', 'inner_steps', 'outer_steps', 'vocab_size', 'vision_dim')


@dataclass
class BenchConfig:
    # the defaults are the scale of Edge-Glass: PixMo, GPT-2's vocabulary, 64 image tokens of 4096 dimensions
    n_layer: int = 2         # blocks in F
    n_head: int = 8          # attention heads
    n_embd: int = 512        # width
    inner_steps: int = 4     # passes of a cycle
    outer_steps: int = 1     # cycles
    vocab_size: int = 50257  # size of the vocabulary
    vision_dim: int = 4096   # dimensions of an image token
    n_image: int = 64        # image tokens
    n_question: int = 20     # question tokens
    n_answer: int = 32       # answer tokens
    batch_size: int = 32     # rows
    # the timing
    repeats: int = 3         # rounds of timing; every figure is the fastest of them
    peak_size: int = 4096    # side of the matrices whose product shows the peak of the machine
    compile: bool = False    # time a compiled step too, with CUDA graphs on a GPU; scale=main: it alone
    device: str = 'auto'     # auto (a GPU if there is one), cpu, cuda, ...
    # something else instead
    scale: str | None = None  # main: a training step of config/trm.py, its parts and costliest operations
    memory: bool = False     # the memory of a training step, by passes, with and without checkpoint_recursion
    profile: bool = False    # the costliest operations of a training step of concat
    encoder: str | None = None  # the speed of this encoder file or folder; random: of Edge-Glass' shapes
    pictures: int = 16       # with encoder: how many drawn photographs
    decoder: str | None = None  # a language model's folder, beside transformers: n_image more question tokens

    def __post_init__(self):
        for key, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f'{key}={value}: expected at least 1')
        if self.scale not in (None, 'main'):
            raise ValueError(f'scale={self.scale}: expected main')
        if sum(map(bool, (self.memory, self.profile, self.encoder, self.decoder, self.scale))) > 1:
            raise ValueError('--memory, --profile, --encoder, --decoder and --scale: one at a time')


def name_of(dtype):
    return str(dtype).removeprefix('torch.')


# ----------------------------------------------------------------------------
# the decoders

def bench_decoder(b, **settings):
    """A decoder of the benchmark's scale and a batch for it, all tokens real.

    Shapes: -> decoder, (vision (B, N, D), question (B, Q), answer (B, A), targets (B, A))
    """
    torch.manual_seed(0)
    scale = {key: getattr(b, key) for key in SCALE}
    config = ModelConfig(**scale | dict(eos_id=-1) | settings)  # no end token: answers get their whole length
    decoder = build_model(config).to(b.device)

    def tokens(length):
        return torch.randint(3, b.vocab_size, (b.batch_size, length), device=b.device)

    answer = tokens(b.n_answer)
    vision = torch.randn(b.batch_size, b.n_image, b.vision_dim, device=b.device)
    return decoder, (vision, tokens(b.n_question), answer, answer.roll(-1, dims=1))


class Contender:
    """A line of the benchmark: a decoder, how its loop runs and in which dtype, and the best times so far."""

    def __init__(self, b, name, loop, dtype, decoder, batch):
        self.b = b
        self.name = name
        self.loop = loop  # naive, cached or compiled
        self.dtype = dtype
        self.decoder = decoder
        self.batch = batch
        self.optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
        self.step_s = math.inf
        self.write_s = math.inf
        # FLOPs are those of the decoder as it is written: the counter does not see into compiled code
        self.forward = decoder
        with torch.no_grad():
            self.forward_flops = flops_of(self.loss)
        self.step_flops = flops_of(self.step)
        if loop == 'compiled':
            self.forward = torch.compile(decoder, mode='reduce-overhead')  # on a GPU with CUDA graphs
            for _ in range(3):  # compile, warm up, record
                self.step()
        else:
            self.write(2)

    def loss(self):
        with autocast_to(self.dtype, self.b.device):
            if self.loop == 'naive':
                vision, question, answer, targets = self.batch
                return cross_entropy(naive_logits(self.decoder, vision, question, answer), targets)
            return self.forward(*self.batch)[1]

    def step(self):
        """A training step."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def write(self, length=None):
        """Generates answers of this length, or of the benchmark's."""
        vision, question, *_ = self.batch
        length = length or self.b.n_answer
        with autocast_to(self.dtype, self.b.device):
            if self.loop == 'naive':
                naive_generate(self.decoder, vision, question, length)
            else:
                self.decoder.generate(vision, question, length)

    def time(self, writing):
        """Keeps the better time of a training step and, where `writing`, of generation."""
        self.step_s = min(self.step_s, seconds(self.step, self.b.device))
        if writing:
            self.write_s = min(self.write_s, seconds(self.write, self.b.device))

    def row(self, naive, peak):
        """A row of the table; the speed-ups are over `naive`, MFU is the share of `peak` FLOP/s."""
        share = self.step_flops / self.step_s / peak
        cells = [self.name, self.loop, name_of(self.dtype)]
        cells += [f'{self.forward_flops / 1e9:.4g}', f'{self.step_flops / 1e9:.4g}']
        cells += [f'{1e3 * self.step_s:.4g}', f'{naive.step_s / self.step_s:.1f}', f'{100 * share:.0f} %']
        if self.write_s == math.inf:
            return cells + ['-', '-']
        n_tokens = self.b.batch_size * self.b.n_answer
        return cells + [f'{n_tokens / self.write_s:.0f}', f'{naive.write_s / self.write_s:.1f}']


def peak_flops(b, dtype):
    """FLOP/s of a product of large square matrices, the best of four: what this machine can do."""
    m = torch.randn(b.peak_size, b.peak_size, device=b.device, dtype=dtype)
    fastest = min(seconds(partial(torch.matmul, m, m), b.device) for _ in range(4))
    return 2 * b.peak_size ** 3 / fastest


def loops_of(b):
    """The loops that are timed, and in which dtypes. The naive one is the yardstick, in float32 alone."""
    loops = [('naive', torch.float32)]
    for dtype in fast_dtypes(b.device):
        loops.append(('cached', dtype))
        if b.compile:
            loops.append(('compiled', dtype))
    return loops


def benchmark(b):
    """Prints parameters, FLOPs, times and speeds of plain, concat and add, beside the naive loop."""
    peaks = {dtype: peak_flops(b, dtype) for dtype in fast_dtypes(b.device)}
    said = [f'{name_of(dtype)} peak {peak / 1e9:.0f} GFLOP/s' for dtype, peak in peaks.items()]
    print(' | '.join(said), f'(a product of matrices of side {b.peak_size})')

    decoders = dict(plain=dict(kind='plain', n_layer=2 * b.n_layer), concat={}, add=dict(recursion='add'))
    contenders = []
    sizes = []
    for name, settings in decoders.items():
        decoder, batch = bench_decoder(b, **settings)
        counts = decoder.parameter_counts()
        sizes.append([name, *(f'{n / 1e6:.2f} M' for n in counts.values())])
        contenders += [Contender(b, name, loop, dtype, decoder, batch) for loop, dtype in loops_of(b)]
    print(table(['parameters', *counts], sizes))

    # side by side: a round times everything once, so that a busy minute of the machine hits all alike
    for k in range(b.repeats):
        for contender in contenders:
            once = contender.loop == 'naive' and k == 0  # it is too slow to write in every round
            contender.time(writing=contender.loop == 'cached' or once)
    naive = {contender.name: contender for contender in contenders if contender.loop == 'naive'}
    rows = [c.row(naive[c.name], peaks[c.dtype]) for c in contenders]
    print(table(['decoder', 'loop', 'dtype', 'GFLOP forward', 'GFLOP step', 'ms step', 'speed-up', 'MFU',
                 'tokens/s written', 'speed-up'], rows))


def show_profile(b, most=8):
    """Prints the costliest operations of a training step of concat, in the fastest dtype."""
    decoder, batch = bench_decoder(b)
    loop = 'compiled' if b.compile else 'cached'
    contender = Contender(b, 'concat', loop, fast_dtypes(b.device)[-1], decoder, batch)
    contender.step()  # it asks for memory that is not there yet
    print(costliest(contender.step, b.device, most))


def costliest(function, device, most):
    """A table of the operations in a call that cost most."""
    with torch.profiler.profile() as profiler:
        function()
    on_gpu = device.startswith('cuda')
    costs = []  # (microseconds of its own, event)
    for event in profiler.key_averages():
        # operations alone: a GPU's kernels, whose time they have, are listed too
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            costs.append((own, event))
    total = sum(own for own, _ in costs)
    costs.sort(key=lambda cost: cost[0], reverse=True)
    rows = [[e.key[:60], e.count, f'{own / 1e3:.1f}', f'{own / total:.0%}'] for own, e in costs[:most]]
    return table(['operation', 'calls', 'ms', 'share'], rows)


def main_job(b, steps=30, most=12):
    """Prints what a training step of config/trm.py takes, of questions of 14 tokens and answers of two."""
    config = Path(__file__).parent.parent / 'config/trm.py'
    s, _ = configure(TrainConfig, [str(config)])
    torch.manual_seed(0)
    dtype = fast_dtypes(b.device)[-1]
    decoder = build_model(s.model_config(vision_dim=128)).to(b.device)
    average = copy.deepcopy(decoder)
    parameters = list(decoder.parameters())
    optimizers = make_optimizers([(1.0, decoder)], s, dtype)
    guard = Guard(b.device, dtype, allowed=0)
    lr = torch.tensor(1e-3, device=b.device)
    tokens = torch.randint(3, s.vocab_size, (s.batch_size, 18), device=b.device)
    question, answer, targets = tokens.split((14, 2, 2), dim=1)        # (B, 14), (B, 2) and (B, 2)
    vision = torch.randn(s.batch_size, 16, 128, device=b.device)
    losses = []
    if b.compile:
        compile_layers(decoder, b.device)

    def forward():
        with autocast_to(dtype, b.device):
            losses[:] = [decoder(vision, question, answer, targets)[1]]

    def backward():
        losses[0].backward()
        losses[0] = losses[0].detach()  # or its graph would keep the stream of the first step

    def optimize():
        set_learning_rate(optimizers, lr)
        _, skip, _ = update(parameters, optimizers, guard, losses[0], s.grad_clip)
        follow(average, decoder, (1 - s.ema) * (1 - skip))

    def step(given=None):
        forward()
        backward()
        optimize()
        return losses[0]

    parts = dict(forward=forward, backward=backward, optimizers=optimize)
    times = {name: [] for name in parts}
    for _ in range(steps):
        for name, part in parts.items():
            times[name].append(seconds(part, b.device))
    fastest = {name: min(of_part) for name, of_part in times.items()}
    whole = [sum(of_step) for of_step in zip(*times.values())]
    flops = flops_of(step)
    peak = peak_flops(b, dtype)
    rows = [[name, f'{1e3 * took:.1f}', f'{took / min(whole):.0%}'] for name, took in fastest.items()]
    print(table(['part', 'ms', 'share'], rows))
    print(f'a step: {1e3 * min(whole):.1f} ms at best, {1e3 * median(whole):.1f} in the middle of {steps}')
    print(f'{flops / 1e9:.1f} GFLOP, {flops / min(whole) / peak:.0%} of the {name_of(dtype)} peak, '
          f'{peak / 1e9:.0f} GFLOP/s: at peak {1e3 * flops / peak:.1f} ms')
    print(costliest(step, b.device, most))
    if b.device.startswith('cuda') and not b.compile:
        print(f'its first step took {times["forward"][0] + times["backward"][0]:.1f} s; as a CUDA graph:')
        graph = Captured(step, b.device)
        took = [seconds(partial(graph, []), b.device) for _ in range(steps)]
        print(f'{1e3 * min(took):.1f} ms at best, {1e3 * median(took):.1f} in the middle of {steps}, '
              f'{took[1]:.1f} s to record it')
    time_writing(b, decoder, vision, question)


def time_writing(b, decoder, vision, question, n=32):
    """Prints what a token of a batch of answers takes, on a GPU as a CUDA graph too."""
    decoder.config = replace(decoder.config, eos_id=-1)  # all answers get their whole length
    writers = {'': None}
    if b.device.startswith('cuda'):
        writers[' as CUDA graphs'] = writer_of(decoder, b.device)
    for name, writer in writers.items():
        write = partial(decoder.generate, vision, question, n, writer=writer)
        took = min(seconds(write, b.device) for _ in range(4))
        print(f'{len(question)} answers of {n} tokens{name}: {1e3 * took / n:.2f} ms a token')


def show_memory(b, steps=(1, 2, 4, 8, 16)):
    """Prints how much memory a forward and a backward pass add to the weights, gradients included."""
    rows = []
    for n in steps:
        row = [n]
        for recompute in (False, True):
            # each in a process of its own: what counts is the most that one has used
            with ProcessPoolExecutor(1, get_context('spawn')) as pool:
                added = pool.submit(peak_memory, replace(b, inner_steps=n), recompute).result()
            row.append(f'{added / 2 ** 20:.0f}')
        rows.append(row)
    print(table(['passes', 'MiB, all kept', 'MiB, checkpoint_recursion'], rows))


def peak_memory(b, recompute):
    """Bytes that a forward and a backward pass add to the most that the process has used so far."""
    decoder, batch = bench_decoder(b, checkpoint_recursion=recompute)
    ones = torch.ones(8, 8, device=b.device)
    ones @ ones  # a GPU's library takes its own memory with the first product
    before = most_memory(b.device)
    decoder(*batch)[1].backward()
    return most_memory(b.device) - before


# ----------------------------------------------------------------------------
# the encoder

def noise_photographs(n, size=(1024, 768)):
    """The bytes of n JPEG files that compress about as photographs do: coarse noise, enlarged."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(n):
        noise = rng.integers(0, 256, (24, 32, 3), np.uint8)            # (height, width, 3)
        file = io.BytesIO()
        Image.fromarray(noise).resize(size, Image.BICUBIC).save(file, 'JPEG', quality=90)
        files.append(file.getvalue())
    return files


def open_for_timing(path):
    """An encoder and what to say of it; `random`: with random weights of Edge-Glass' shapes."""
    if path == 'random':
        encoder = Encoder(EDGE_GLASS_CONFIG).eval().requires_grad_(False)
        about = 'random weights'
    else:
        encoder = check_reads(load_encoder(path), path, 'picture')
        about = f'{path} | fingerprint {encoder.fingerprint()}'
    return encoder, f'{about} | {sum(p.numel() for p in encoder.parameters()):,} parameters'


def bench_encoder(encoder, n, device):
    """Prints how many pictures per second are decoded and encoded, and the most memory that took."""
    files = noise_photographs(n)

    def decode(data):
        return encoder.pixels(encoder.open(data))                        # (3, S, S)

    def decode_all():
        with ThreadPoolExecutor() as pool:
            list(pool.map(decode, files))

    print(f'decoding, all cores: {n / seconds(decode_all, device):.1f} pictures/s')
    pixels = decode(files[0])
    for dtype in (torch.float32, torch.bfloat16):
        images = encoder.normalise(torch.stack([pixels] * min(n, 64)).to(device))      # (B, 3, S, S)
        with autocast_to(dtype, device):
            tokens = encoder.encode_images(images[:1])                 # (1, N, D); and it warms up
            took = min(seconds(partial(encoder.encode_images, images), device) for _ in range(2))
        print(f'encoding, {name_of(dtype)}: {len(images) / took:.2f} pictures/s, '
              f'{min(len(images), encoder.at_once)} at once')
    cached = 2e-6 * tokens.numel()  # two bytes a number
    used = most_memory(device) / 1e9
    print(f'at most {used:.1f} GB of memory; a picture takes {cached:.2f} MB of the cache')


def main(argv=None):
    b, _ = configure(BenchConfig, sys.argv[1:] if argv is None else argv, '-m lab.bench')
    keep_freed_memory()
    b.device = pick_device(b.device)
    if b.memory:
        show_memory(b)
    elif b.profile:
        show_profile(b)
    elif b.scale:
        main_job(b)
    elif b.encoder:
        encoder, about = open_for_timing(b.encoder)
        print(about)
        bench_encoder(encoder.to(b.device), b.pictures, b.device)
    elif b.decoder:
        compare_decoders(b, partial(peak_flops, b))
    else:
        benchmark(b)


if __name__ == '__main__':
    run_script(main)
