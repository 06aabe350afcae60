"""The decoder as one would first write it: the yardstick of the benchmark and of the tests."""
import itertools
from functools import partial

import torch

from model import hide, norm, rotations


def naive_logits(decoder, vision, question, answer):
    """The decoder as one would first write it, and as Edge-Glass did: every step of the recursion runs F over the whole sequence
    [x | y | z], built anew. No padding. The same logits as `Decoder.forward`; the yardstick of the benchmark.

    Shapes: as `Decoder.forward`, without padding -> (B, A, V)
    """
    c, A = decoder.config, answer.size(1)
    x = decoder.embed(question)
    x = norm(torch.cat([decoder.vision_proj(vision.type_as(x)), x], dim=1) if c.use_vision else x)  # (B, S, C)
    S, e = x.size(1), norm(decoder.embed(answer))                      # (B, A, C)
    place = partial(torch.arange, device=x.device)
    position = torch.cat([place(S), S + place(A).repeat(c.streams)])   # (S + streams * A,)
    when = position.clamp(min=S - 1) if c.prefix_lm else position
    mask = hide(when[:, None] < when, x.dtype)
    rope = rotations(position[None], c.n_embd // c.n_head)
    carry = norm if c.norm == 'pre' else lambda h: h
    blocks = itertools.cycle(decoder.blocks)                           # each step takes the next ones, if it does not share them

    def network(h):
        both, own = torch.cat([x, h], dim=1), [next(blocks) for _ in range(c.n_layer)]
        for first, block in zip(decoder.blocks, own):
            after, *_ = block(both, rope, mask)
            if block is not first:  # a step with blocks of its own: x goes on through the first ones
                after = torch.cat([first(both, rope, mask)[0][:, :S], after[:, S:]], dim=1)
            both = after
        return carry(both[:, S:])

    y = norm(decoder.y_start).expand_as(e) if c.recursion == 'add' else e
    z = None if c.recursion == 'loop' else norm(decoder.z_start).expand_as(e)
    for t in range(c.outer_steps):
        with torch.set_grad_enabled(t == c.outer_steps - 1 and torch.is_grad_enabled()):
            for _ in range(c.inner_steps):
                if c.recursion == 'concat':
                    y, z = network(torch.cat([y, z], dim=1)).chunk(2, dim=1)
                elif c.recursion == 'loop':
                    y = network(y)
                else:
                    z = network(carry(e + y + z))
            if c.recursion == 'add':
                y = network(carry(y + z))
    return decoder.head(decoder.read_out(y))


def naive_generate(decoder, vision, question, max_new_tokens):
    """Greedy generation that runs `naive_logits` over everything for every token. -> (B, max_new_tokens)"""
    answer = torch.full((len(question), 1), decoder.config.bos_id, device=question.device)
    for _ in range(max_new_tokens):
        answer = torch.cat([answer, naive_logits(decoder, vision, question, answer)[:, -1:].argmax(-1)], dim=1)
    return answer[:, 1:]
