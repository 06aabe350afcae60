"""What moves the weights: AdamW, Muon for matrices, and the average that follows."""

import math

import torch


def make_optimizers(parts, s, dtype=torch.float32):
    """-> [AdamW], or [AdamW, Muon], which then has the matrices of the linear layers.

    parts: [(share of the learning rate, module), ...]; what is in two is the first one's. Weight decay is on
    matrices and the kernels of convolutions; biases, norms, start states and scales have none. dtype: of
    Muon's products.
    """
    layers = [module for _, part in parts for module in part.modules()]
    words = {m.weight.shape for m in layers if isinstance(m, torch.nn.Embedding)}  # the head's shape too
    linear = [m.weight for m in layers if isinstance(m, torch.nn.Linear)]
    muon = {weight for weight in linear if weight.shape not in words}
    if s.optimizer == 'adamw':
        muon = set()
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
    # fused: takes half the time, and skips a step where the device says so; capturable: by a graph
    adamw = torch.optim.AdamW(groups, s.learning_rate, (s.beta1, s.beta2), fused=True, capturable=True)
    if not muon:
        return [adamw]
    return [adamw, Muon(matrices, s.learning_rate, s.momentum, s.weight_decay, dtype)]


def set_learning_rate(optimizers, lr):
    """Gives every group its share of the learning rate. Shapes: lr (), on the device"""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr * group['share']


def update(parameters, optimizers, guard, loss, grad_clip):
    """A step of all optimizers with the clipped gradient, on the device alone.

    Shapes: loss () -> () each: the gradient's norm; 1.0 where the step is skipped, as it is not finite or too
        many before were not; 1.0 where it is bad
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    guard.unscale(grads)  # before clipping, or the limit would hold for the scaled gradient
    gnorm = torch.zeros_like(loss)
    if grads:  # no row may have trained anything: then clip_grad_norm_ would answer on the CPU
        gnorm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    skip, bad = guard.judge(loss, gnorm)
    for optimizer in optimizers:
        optimizer.found_inf = skip  # AdamW takes it from here, as GradScaler gives it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return gnorm, skip, bad


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
