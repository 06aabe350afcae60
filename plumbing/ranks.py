"""Several processes that work together, started by torchrun: who is who, turns, shares of a batch, sums over
all."""

import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch

from plumbing.console import nowhere
from plumbing.machine import pick_device

# what torchrun sets in the environment of every process
TORCHRUN_SETS = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def work_together():
    """Whether this process has joined others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world():
    """-> the number of this process, and how many there are; (0, 1) where it works alone."""
    if work_together():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def alone():
    """Whether this process works alone."""
    return rank_and_world()[1] == 1


def in_turn(make):
    """Calls make() in the first process, then in the first of every other machine, then in all others, and
    returns what it returns there: what the first one leaves on disk, the others find."""
    rank, world = rank_and_world()
    if world == 1:
        return make()
    if rank == 0:
        turn = 0
    elif int(os.environ.get('LOCAL_RANK', 0)) == 0:
        turn = 1
    else:
        turn = 2
    for now in range(3):
        if now == turn:
            made = make()
        # everybody waits here until the turn is over
        torch.distributed.barrier()
    return made


def from_all(item):
    """-> the items of all processes, a list; items are plain Python values, and tensors on the CPU."""
    _, world = rank_and_world()
    items = [item] * world
    if world > 1:
        torch.distributed.all_gather_object(items, item)
    return items


def shared(work, n):
    """-> [work(0), ..., work(n - 1)]: each is done by one process and handed to all, on the CPU."""
    rank, world = rank_and_world()
    by_rank = from_all([work(k) for k in range(rank, n, world)])
    return [by_rank[k % world][k // world] for k in range(n)]


def by_first(make):
    """-> what make() returns in the first process, which alone calls it."""
    first = rank_and_world()[0] == 0
    return from_all(make() if first else None)[0]


def number_in(variable):
    """The number in a variable of the environment. Raises: ValueError that names it."""
    text = os.environ[variable]
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f'{variable}={text!r} in the environment: expected a number, as torchrun sets it; '
                         f'unset {variable} where this process works alone')
    return int(text)


def started_together():
    """Whether torchrun, or who sets the same variables, started this process beside others. A part of them
    may be left over from another program: then it works alone, and says so. Raises: ValueError."""
    if 'WORLD_SIZE' not in os.environ or number_in('WORLD_SIZE') <= 1:
        return False
    missing = [variable for variable in TORCHRUN_SETS if variable not in os.environ]
    if missing:
        print(f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment without {', '.join(missing)}: "
              f"not by torchrun; this process works alone")
        return False
    if number_in('RANK') >= number_in('WORLD_SIZE'):
        raise ValueError(f"RANK={os.environ['RANK']} in the environment: expected less than "
                         f"WORLD_SIZE={os.environ['WORLD_SIZE']}")
    number_in('LOCAL_RANK')
    number_in('MASTER_PORT')
    return True


@contextmanager
def processes(settings):
    """Joins the processes that torchrun started, where it did -> the device of this one, which
    `settings.device` tells. Only the first one prints to the console.

    Raises: ValueError where the device is not there.
    """
    several = started_together()
    device = settings.device
    if several and device in ('auto', 'cuda') and torch.cuda.is_available():
        # a GPU for each
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device)
    if not several:
        yield device
        return
    backend = 'gloo'
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
        backend = 'nccl'
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    if not torch.distributed.is_torchelastic_launched():
        # variables that are left over look the same, and nobody else will come
        print(f"waiting for {os.environ['WORLD_SIZE']} processes in all at {os.environ['MASTER_ADDR']}:"
              f"{os.environ['MASTER_PORT']}; unset WORLD_SIZE to work alone", flush=True)
    # while torch waits for them no handler of Python's runs: Ctrl-C would do nothing
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    # patience, because all wait while one encodes the pictures; a process that dies is noticed at once all
    # the same
    torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    rank, _ = rank_and_world()
    console = nullcontext() if rank == 0 else redirect_stdout(nowhere())
    with console:
        yield device
    # gloo's threads have then let go of every tensor; one that they hold while Python ends aborts the
    # process, now and then
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def end_with(parent):
    """Ends this process soon after its parent: a torchrun that was killed would else leave it running, in the
    middle of the run and holding its lock."""
    # who loses its parent gets another one
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def shard(batch):
    """Of a batch, the rows of this process: every so-many-th one. A loss that is a mean over the rows'
    `counted` targets gets a `weight`, with which the mean over the processes is the mean over the whole
    batch; a process for which no row is left takes the first one, with weight 0.

    Shapes: counted (B, ...) bool, the targets that the loss is a mean of; B rows -> about B / world
    """
    rank, world = rank_and_world()
    counted = batch.pop('counted')
    if world == 1:
        return batch
    if rank < len(counted):
        rows = slice(rank, None, world)
    else:
        rows = slice(1)
    share = {}
    for key, value in batch.items():
        share[key] = value[rows] if torch.is_tensor(value) else value
    # without a row of its own this is the sum of nothing, 0
    share['weight'] = world * counted[rank::world].sum() / counted.sum()
    return share


def all_reduce(parameters, values):
    """Makes every gradient the mean over the processes. Shapes: values (n,) -> their means, alike in all"""
    _, world = rank_and_world()
    if world == 1:
        return values
    grads = [p.grad for p in parameters if p.grad is not None]
    # one message with everything in it: each costs a wait
    flat = torch.cat([g.flatten() for g in grads] + [values])          # (all numbers,)
    torch.distributed.all_reduce(flat)
    *means, values = (flat / world).split([g.numel() for g in grads] + [len(values)])
    for g, mean in zip(grads, means):
        g.copy_(mean.view_as(g))
    return values


class Gather(torch.autograd.Function):
    """The rows of all processes; a process gets back the gradients that all of them have for its rows."""

    @staticmethod
    def forward(ctx, x):
        _, world = rank_and_world()
        parts = [torch.empty_like(x) for _ in range(world)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)  # (world * B, D)

    @staticmethod
    def backward(ctx, grad):
        rank, world = rank_and_world()
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad.chunk(world)[rank]  # (B, D)


def gathered(x):
    """The rows of all processes that train together, as many in each; x itself where it is one process, or no
    training.

    Shapes: (B, D) -> (world * B, D)
    """
    if work_together() and torch.is_grad_enabled():
        return Gather.apply(x)
    return x
