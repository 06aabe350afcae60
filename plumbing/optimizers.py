"""What moves the weights: AdamW, Muon for matrices, the average that follows, and a guard over bad steps."""

import math

import torch


def make_optimizers(parts, s, dtype=torch.float32):
    """-> [AdamW], or [AdamW, Muon], which then has the matrices of the linear layers.

    parts: [(share of the learning rate, module), ...]; what is in two is the first one's. Weight decay is on
    matrices and the kernels of convolutions; biases, norms, start states and scales have none. dtype: of
    Muon's products.
    """
    muon = set() if s.optimizer == 'adamw' else matrices_in(parts)
    groups = []
    matrices = []
    taken = set()
    for share, part in parts:
        trained = [p for p in part.parameters() if p.requires_grad and p not in taken]
        taken |= {*trained}
        others = [p for p in trained if p not in muon]
        decayed = [p for p in others if p.dim() in (2, 4)]
        plain = [p for p in others if p.dim() not in (2, 4)]
        groups.append(dict(params=decayed, weight_decay=s.weight_decay, share=share))
        groups.append(dict(params=plain, weight_decay=0.0, share=share))
        matrices.append(dict(params=[p for p in trained if p in muon], share=share))
    # fused: takes half the time, and obeys found_inf; capturable: a CUDA graph may record it
    adamw = torch.optim.AdamW(groups, s.learning_rate, (s.beta1, s.beta2), fused=True, capturable=True)
    if not muon:
        return [adamw]
    return [adamw, Muon(matrices, s.learning_rate, s.momentum, s.weight_decay, dtype)]


def matrices_in(parts):
    """The weights of linear layers, a set, but for heads over the words of an embedding."""
    modules = [pair for _, part in parts for pair in part.named_modules()]
    words = {m.weight.shape for _, m in modules if isinstance(m, torch.nn.Embedding)}
    matrices = set()
    for name, m in modules:
        if isinstance(m, torch.nn.Linear):
            # by its name too: a layer of an MLP may have the shape of an embedding
            is_head = 'head' in name.split('.') and m.weight.shape in words
            if not is_head:
                matrices.add(m.weight)
    return matrices


def set_learning_rate(optimizers, lr):
    """Gives every group its share of the learning rate. Shapes: lr (), on the device"""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * group['share']


def update(parameters, optimizers, guard, loss, grad_clip):
    """A step of all optimizers with the clipped gradient, on the device alone.

    Shapes: loss () -> () each: the norm of the gradient before clipping; 1.0 where the step is skipped; 1.0
        where it is bad, both as `Guard.judge` says
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    gnorm = torch.zeros_like(loss)
    if grads:  # perhaps nothing is trained by these rows
        guard.unscale(grads)  # before clipping, or the limit would hold for the scaled gradient
        gnorm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    skip, bad = guard.judge(loss, gnorm)
    for optimizer in optimizers:
        optimizer.found_inf = skip  # AdamW takes it from here, as GradScaler gives it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return gnorm, skip, bad


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
        """From now on n bad steps may come; below 0 it counts as 0."""
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


@torch.no_grad()
def follow(average, model, rate):
    """Moves the averaged weights towards the model's, by a share `rate` of the way, ()."""
    if average is model:
        return
    averages = list(average.parameters())
    ways = torch._foreach_sub(list(model.parameters()), averages)
    torch._foreach_mul_(ways, rate)
    torch._foreach_add_(averages, ways)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for the matrices of linear layers: a matrix moves as far along the
    directions that its gradient rarely points to as along the others.

    Its products are in `dtype`: torch.optim.Muon always takes bfloat16, which many CPUs only emulate.
    Source: Jordan 2024, kellerjordan.github.io/posts/muon; the scale, with which AdamW's learning rates fit,
    Liu 2025, arXiv 2502.16982.
    """

    def __init__(self, params, lr, momentum, weight_decay, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        self.found_inf = torch.zeros(())  # 1.0: the step is skipped

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}  # few large products are faster than many small ones
            for p in group['params']:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for params in same_shape.values():
                self.move(params, group['lr'], group['momentum'], group['weight_decay'])

    def move(self, params, lr, momentum, weight_decay):
        """A step of matrices of one shape. lr: (), on the device."""
        skip = self.found_inf                                          # (): 1.0, or 0.0
        grads = torch.stack([p.grad for p in params])                  # (n, rows, columns)
        grads = grads.masked_fill(skip > 0, 0.)  # even 0 * nan would be nan
        averages = [self.average_of(p) for p in params]
        average = torch.stack(averages).lerp(grads, (1 - momentum) * (1 - skip))     # (n, rows, columns)
        torch._foreach_copy_(averages, average.unbind())
        ahead = grads.lerp(average, momentum)  # Nesterov: one step ahead
        lr = lr * (1 - skip)
        rate = -.2 * lr * max(grads.shape[1:]) ** .5  # RMS of the step: .2 lr, about AdamW's
        moves = rate * orthogonal(ahead, self.dtype)                   # (n, rows, columns)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, moves.unbind())

    def average_of(self, p):
        """A matrix's momentum: the mean of its gradients, in which the latest count most."""
        if 'average' not in self.state[p]:
            self.state[p]['average'] = torch.zeros_like(p)
        return self.state[p]['average']


def orthogonal(g, dtype):
    """Matrices with the singular vectors of g and singular values near 1 (.7 to 1.2; tiny ones less), by
    Newton and Schulz's iteration in `dtype`. Shapes: (n, rows, columns) -> the same, in g's dtype."""
    wide = g.size(1) <= g.size(2)  # the smaller side first: the products are smaller
    x = g if wide else g.mT
    # no singular value above 1: from large ones the iteration would blow up
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)      # (n, small, large)
    for _ in range(5):  # x <- 3.4445 x - 4.7750 a x + 2.0315 a a x
        a = x @ x.mT                                                   # (n, small, small)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)                        # (n, small, large)
    return (x if wide else x.mT).to(g.dtype)
