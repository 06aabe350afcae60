"""Several processes that work together, started by torchrun: who is who, turns, shares of a batch, sums over
all."""

import os
import threading
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch

from plumbing.machine import pick_device


def rank_and_world():
    """-> the number of this process, and how many there are; (0, 1) where it works alone."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


def in_turn(make):
    """Calls make() in the first process, then in the first of every other machine, then in all others, and
    returns what it returns there: what the first one leaves on disk, the others find."""
    rank, world = rank_and_world()
    turn = 0 if rank == 0 else 1 if int(os.environ.get('LOCAL_RANK', 0)) == 0 else 2
    for now in range(3 if world > 1 else 1):
        if now == turn:
            made = make()
        if world > 1:
            torch.distributed.barrier()
    return made


def from_all(item):
    """-> the items of all processes, a list; items are plain Python values."""
    items = [item] * rank_and_world()[1]
    if len(items) > 1:
        torch.distributed.all_gather_object(items, item)
    return items


@contextmanager
def processes(settings):
    """Joins the processes that torchrun started, where it did -> the device of this one. Only the first one
    prints to the console.
    Raises: ValueError where the device is not there."""
    several, device = int(os.environ.get('WORLD_SIZE', 1)) > 1, settings.device
    if several and device in ('auto', 'cuda') and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device)
    if settings.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
    if not several:
        yield device
        return
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # patience, because all wait while one encodes the pictures; a process that dies is noticed at once all
    # the same
    torch.distributed.init_process_group(
        'nccl' if device.startswith('cuda') else 'gloo', timeout=timedelta(days=1)
    )
    with redirect_stdout(open(os.devnull, 'w')) if rank_and_world()[0] else nullcontext():
        yield device
    # gloo's threads have then let go of every tensor; one that they hold while Python ends aborts the
    # process, now and then
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def end_with(parent):
    """Ends this process soon after its parent: a torchrun that was killed would else leave it behind, in the
    middle of the run and holding its lock."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def shard(batch):
    """Of a batch, the rows of this process: every so-many-th one. A loss that is a mean over the rows'
    `counted` targets gets a `weight`, with which the mean over the processes is the mean over the whole
    batch; a process for which no row is left takes the first one, with weight 0."""
    (rank, world), counted = rank_and_world(), batch.pop('counted')
    if world > 1:
        weight, rows = (
            world * counted[rank::world].sum() / counted.sum(),
            slice(rank, None, world) if rank < len(counted) else slice(1),
        )
        batch = {
            key: value[rows] if torch.is_tensor(value) else value for key, value in batch.items()
        } | dict(weight=weight)
    return batch


def all_reduce(parameters, losses, stop):
    """Makes every gradient the mean over the processes -> the mean losses, a dict of floats, and whether any
    process was asked to stop: the same in all."""
    world, values = rank_and_world()[1], torch.stack([*losses.values()]).float()
    if world > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads] + [values, values.new_tensor([float(stop)])])
        torch.distributed.all_reduce(flat)
        *means, values, stop = (flat / world).split([g.numel() for g in grads] + [len(values), 1])
        for g, mean in zip(grads, means):
            g.copy_(mean.view_as(g))
    return dict(zip(losses, values.tolist())), bool(stop)


class Gather(torch.autograd.Function):
    """The rows of all processes; a process gets back the gradients that all of them have for its rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gathered(x):
    """The rows of all processes that train together, as many in each; x itself where it is one process, or no
    training. Shapes: (B, D) -> (world * B, D)"""
    together = (
        torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()
    )
    return Gather.apply(x) if together else x
