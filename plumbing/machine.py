"""The machine: device, dtype, memory, clock, compiler, FLOPs, and which commit runs on it."""

import ctypes
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

try:
    import resource
except ImportError:  # Windows
    resource = None

# options of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3


def pick_device(device):
    """auto: a GPU where there is one. Raises: ValueError where there is no such device."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        # only a tensor shows whether a device works
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0][:120]
        raise ValueError(f'device={device}: not to be had here ({reason}); expected auto, cpu, cuda '
                         f'or cuda:N') from None
    return device


def fast_dtypes(device):
    """float32, and bfloat16 after it where the hardware multiplies in it; elsewhere it is emulated, a hundred
    times slower."""
    if device.startswith('cuda'):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    if has_bfloat16:
        return [torch.float32, torch.bfloat16]
    return [torch.float32]


def pick_dtype(dtype, device):
    """auto: bfloat16 where it is fast."""
    if dtype == 'auto':
        return fast_dtypes(device)[-1]
    return getattr(torch, dtype)


def autocast_to(dtype, device):
    """Matrix products in `dtype`; in float32 as they are."""
    return torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32)


def seconds(function, device):
    """Wall clock of a call. On a GPU, waits for it."""
    on_gpu = device.startswith('cuda')
    # a GPU works off a queue: it has to be empty before the clock starts, and again before it stops
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
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB
    return most if sys.platform == 'darwin' else most * 1024


def room_on(device):
    """Bytes of a GPU's memory that are free for what is to stay there; 0 for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith('cuda') else 0


def keep_freed_memory():
    """Lets glibc keep the memory that a step frees for the next one, instead of handing it back to Linux and
    asking for fresh, zeroed pages: a quarter of an alignment step on a CPU. Elsewhere it does nothing."""
    if sys.platform != 'linux':
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, 'mallopt'):  # another libc
        return
    libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**28)


def sine_and_one(x):
    """Something to compile."""
    return x.sin() + 1


def compile_layers(model, device):
    """torch.compile, where a compiler works; else the reason is printed.

    One layer at a time: it is compiled once for all layers and all passes of a recursion. A size becomes
    dynamic when it first changes: with dynamic=True from the start torch 2.13 fails in bfloat16.
    """
    try:
        # whether a compiler is there shows only when something is compiled
        torch.compile(sine_and_one)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError, torch._dynamo.exc.TorchDynamoException) as e:
        reason = str(e).strip().splitlines()[0][:160]
        print(f'torch.compile does not work here, running without it: {reason}')
        return
    # on a GPU it ends in an AssertionError where a size is dynamic: pytorch issue 197077
    torch._inductor.config.triton.coalesce_tiling_analysis = False
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.compile()


def commit():
    """The commit of this code, with +changes where files differ from it; unknown outside of git."""
    try:
        changed = git('status', '--porcelain', '-uno')
        name = git('rev-parse', '--short', 'HEAD')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return f'{name}+changes' if changed else name


def git(*words):
    """What git answers. Raises: OSError without git, subprocess.CalledProcessError where it fails."""
    folder = Path(__file__).parent
    done = subprocess.run(['git', *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def device_name(device):
    """The model of the GPU or the CPU."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    # on Linux `platform` knows x86_64 alone, the model stands here
    cpu = Path('/proc/cpuinfo')
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    for line in lines:
        if line.startswith('model name'):
            return f"{line.partition(': ')[2].strip()} cpu"
    return f'{platform.processor() or platform.machine()} cpu'


def flops_of(function):
    """FLOPs of the matrix products and convolutions in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def mapped(function, given):
    """The same nested lists and dicts with function(tensor) in place of every tensor; what is none stays."""
    if isinstance(given, dict):
        return {key: mapped(function, value) for key, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [mapped(function, value) for value in given]
    return function(given) if torch.is_tensor(given) else given


def on_device(given, device, copy=False):
    """Nested lists and dicts with their tensors on the device. Nobody waits for what is in pinned memory."""
    return mapped(partial(torch.Tensor.to, device=device, non_blocking=True, copy=copy), given)


def pinned(given, device):
    """The same in memory that a GPU copies from while the host goes on; for a CPU as it is."""
    return mapped(torch.Tensor.pin_memory, given) if device.startswith('cuda') else given
