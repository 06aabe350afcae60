"""The next batches are made while the device works at these."""

from concurrent.futures import ThreadPoolExecutor

from plumbing.machine import pinned
from plumbing.ranks import shard


class Ahead:
    """make(step) of step after step, the next one in a thread while the device works at this one. It has to
    depend on the step alone. After `max_steps` none is made."""

    def __init__(self, make, max_steps):
        self.make = make
        self.max_steps = max_steps
        self.thread = ThreadPoolExecutor(1)
        self.made = {}  # by step, futures: that of the next one

    def __call__(self, step):
        """-> make(step). Raises: what it raises."""
        now = self.made.pop(step, None) or self.thread.submit(self.make, step)
        if step + 1 < self.max_steps:
            self.made = {step + 1: self.thread.submit(self.make, step + 1)}
        return now.result()


def batches_of_step(step, draw, fetch, s, device):
    """-> the batches of a step, dicts, with what the device needs of their files; names of some of its rows;
    and how many rows there are, those of all processes.

    draw(k): the k-th batch of the run and names of some of its rows; `counted` marks a batch's targets, see
    `shard`. fetch: as `ContextTokens.fetch`
    """
    batches = []
    names = []
    n_rows = 0
    for micro in range(s.grad_accum):
        batch, some_names = draw(step * s.grad_accum + micro)
        n_rows += len(batch['counted'])
        batches.append(pinned(fetch(shard(batch)), device))
        names += some_names
    return batches, names, n_rows
