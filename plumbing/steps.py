"""A device that is kept busy: the next batches are made meanwhile, and steps that are not finite are skipped
by the device itself."""

from concurrent.futures import ThreadPoolExecutor

import torch

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

    draw(k): the k-th batch of the run and names of some of its rows; a batch has its numbers of targets in
    `counted`, see `shard`. fetch: as `ContextTokens.fetch`
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


class Guard:
    """Decides on the device which steps may move the weights, so that nobody waits for it.

    A step whose loss or gradient is not finite is bad and is skipped: nothing moves. After more of them than
    are allowed every step is skipped: when the host hears of it, all is as it was before the last one.
    In float16 small gradients would be 0, so the loss is scaled up. A gradient that is not finite while the
    loss is, only shows that the scale was too high: the step is skipped and not bad, and the scale is halved,
    down to 1.
    Source: the course of the scale, torch.amp.GradScaler.
    """

    DOUBLED_AFTER = 2000  # steps without such a gradient

    def __init__(self, device, dtype, allowed):
        self.is_half = dtype == torch.float16
        self.allowed = torch.full((), float(allowed), device=device)  # bad steps that may still come
        self.scale = torch.full((), 2. ** 16 if self.is_half else 1., device=device)
        self.since = torch.zeros((), device=device)  # steps since the scale was changed

    def allow(self, n):
        """From now on so many bad steps may come; of less than none the next one is too many, as of none."""
        self.allowed.fill_(max(0, n))

    def scaled(self, loss):
        return loss * self.scale if self.is_half else loss

    def unscale(self, grads):
        if self.is_half:
            torch._foreach_mul_(grads, 1 / self.scale)

    def judge(self, loss, gnorm):
        """Shapes: () each -> 1.0 where the step is skipped, 1.0 where it is bad, else 0.0, () both."""
        finite = torch.isfinite(loss + gnorm)
        over = ~finite & torch.isfinite(loss) & (self.scale > 1)
        bad = ~finite & ~over
        self.allowed -= bad.float()
        ended = self.allowed < 0
        if self.is_half:
            since = (self.since + 1) * finite
            doubled = since == self.DOUBLED_AFTER
            scale = self.scale * torch.where(doubled, 2., torch.where(over, .5, 1.))
            self.scale.copy_(torch.where(ended, self.scale, scale))
            self.since.copy_(torch.where(ended, self.since, since * ~doubled))
        return (~finite | ended).float(), bad.float()

    def state_dict(self):
        if not self.is_half:
            return {}
        return dict(scale=self.scale.item(), _growth_tracker=int(self.since))  # named as GradScaler's

    def load_state_dict(self, state):
        if self.is_half:
            self.scale.fill_(state['scale'])
            self.since.fill_(state['_growth_tracker'])
