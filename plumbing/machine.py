"""The machine: device, dtype, memory, clock, compiler, FLOPs, and which commit runs on it."""

import ctypes
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch


def pick_device(device):
    """Raises: ValueError where there is no such device."""
    import torch

    device = ('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(
            f'device={device}: not to be had here ({str(e).splitlines()[0][:120]}); expected auto, cpu, cuda '
            f'or cuda:N'
        ) from None
    return device


def fast_dtypes(device):
    """float32, and bfloat16 after it where the hardware multiplies in it; elsewhere it is emulated, a hundred
    times slower."""
    import torch

    bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.startswith('cuda')
        else torch.cpu._is_avx512_bf16_supported()
    )
    return [torch.float32] + [torch.bfloat16] * bf16


def seconds(function, device):
    """Wall clock of a call. On a GPU, waits for it."""
    on_gpu = device.startswith('cuda')
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def most_memory(device):
    """The most bytes that this process has used so far, of the GPU's memory or, on a CPU, of the machine's; 0
    where it cannot be told."""
    if device.startswith('cuda'):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def keep_freed_memory():
    """Lets glibc keep the memory that a step frees for the next one, instead of handing it back to Linux and
    asking for fresh, zeroed pages: a quarter of an alignment step on a CPU. Elsewhere it does nothing."""
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2  # malloc.h
            for option, value in (
                (M_MMAP_THRESHOLD, 2**30),
                (M_TRIM_THRESHOLD, 2**31 - 1),
                (M_TOP_PAD, 2**28),
            ):
                libc.mallopt(option, value)


def pick_dtype(dtype, device):
    """auto: bfloat16 where it is fast."""
    return fast_dtypes(device)[-1] if dtype == 'auto' else getattr(torch, dtype)


def sine_and_one(x):
    """Something to compile."""
    return x.sin() + 1


def compile_layers(model, device):
    """torch.compile, where a compiler works; else the reason is printed. One layer at a time: it is compiled
    once for all layers and all passes of a recursion. A size becomes dynamic when it first changes: with
    dynamic=True from the start torch 2.13 fails in bfloat16."""
    try:
        torch.compile(sine_and_one)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError, torch._dynamo.exc.TorchDynamoException) as e:
        print(f'torch.compile does not work here, running without it: {str(e).strip().splitlines()[0][:160]}')
        return
    torch._inductor.config.triton.coalesce_tiling_analysis = (
        False  # on a GPU it ends in an AssertionError where a size is dynamic: pytorch issue 197077
    )
    for layers in (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        for layer in layers:
            layer.compile()


def commit():
    try:
        here = dict(cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        changed = subprocess.run(['git', 'status', '--porcelain', '-uno'], **here).stdout.strip()
        return subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], **here
        ).stdout.strip() + '+changes' * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def device_name(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    cpu = Path('/proc/cpuinfo')
    names = (
        [line.partition(': ')[2] for line in cpu.read_text().splitlines() if line.startswith('model name')]
        if cpu.is_file()
        else []
    )
    return f'{names[0].strip()} cpu' if names else f'{platform.processor() or platform.machine()} cpu'


def flops_of(function):
    """FLOPs of the matrix products and convolutions in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def on_device(batch, device):
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
