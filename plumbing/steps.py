"""A device that is kept busy: the next batch is made meanwhile, and steps that are not finite are left out by
the device itself."""

from concurrent.futures import ThreadPoolExecutor

import torch


class Ahead:
    """make(step) of step after step, the next one in a thread while the device works at this one. It has to
    depend on the step alone. After `most` steps none is made."""

    def __init__(self, make, most):
        self.make = make
        self.most = most
        self.thread = ThreadPoolExecutor(1)
        self.made = {}  # by step, futures: that of the next one

    def __call__(self, step):
        """-> make(step). Raises: what it raises."""
        now = self.made.pop(step, None) or self.thread.submit(self.make, step)
        if step + 1 < self.most:
            self.made = {step + 1: self.thread.submit(self.make, step + 1)}
        return now.result()


class Guard:
    """Decides on the device which steps may move the weights, so that nobody waits for it.

    A step whose loss or gradient is not finite is bad and moves nothing. After more than `most` of them
    nothing moves at all: when the host hears of it, all is as it was before the last one.
    In float16 small gradients would be 0, so the loss is scaled up. A gradient that is not finite only shows
    that the scale was too high: the step moves nothing and is not bad, and the scale is halved, down to 1.
    Source: the course of the scale, torch.amp.GradScaler.
    """

    DOUBLED_AFTER = 2000  # steps without such a gradient

    def __init__(self, device, dtype, most):
        self.is_half = dtype == torch.float16
        self.left = torch.full((), float(most), device=device)  # bad steps that may still come
        self.scale = torch.full((), 2. ** 16 if self.is_half else 1., device=device)
        self.since = torch.zeros((), device=device)  # steps since the scale was changed

    def scaled(self, loss):
        return loss * self.scale if self.is_half else loss

    def unscale(self, grads):
        if self.is_half:
            torch._foreach_mul_(grads, 1 / self.scale)

    def judge(self, loss, gnorm):
        """Shapes: () each -> 1.0 where no weight may move, 1.0 where the step is bad, else 0.0, () both."""
        finite = torch.isfinite(loss + gnorm)
        over = ~finite & torch.isfinite(loss) & (self.scale > 1)
        bad = ~finite & ~over
        self.left -= bad.float()
        stopped = self.left < 0
        if self.is_half:
            since = (self.since + 1) * finite
            doubled = since == self.DOUBLED_AFTER
            scale = self.scale * torch.where(doubled, 2., torch.where(over, .5, 1.))
            self.scale.copy_(torch.where(stopped, self.scale, scale))
            self.since.copy_(torch.where(stopped, self.since, since * ~doubled))
        return (~finite | stopped).float(), bad.float()

    def state_dict(self):
        if not self.is_half:
            return {}
        return dict(scale=self.scale.item(), _growth_tracker=int(self.since))  # named as GradScaler's

    def load_state_dict(self, state):
        if self.is_half:
            self.scale.fill_(state['scale'])
            self.since.fill_(state['_growth_tracker'])
