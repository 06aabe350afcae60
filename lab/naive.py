"""The decoder as one would first write it: the yardstick of the benchmark and of the tests."""

import torch

from model import hide, norm, rotations


def naive_logits(decoder, vision, question, answer):
    """Every pass runs F over the whole sequence [x | y | z], built anew. No padding, no cache.

    The same logits as `Decoder.forward`; its branches are its own, so that a test of the two can fail.
    Shapes: as `Decoder.forward`, without padding -> (B, A, V)
    """
    c = decoder.config
    A = answer.size(1)
    x = decoder.embed(question)                                        # (B, Q, C)
    if c.use_vision:
        image = decoder.vision_proj(vision.type_as(x))                 # (B, N, C)
        x = torch.cat([image, x], dim=1)                               # (B, S, C)
    x = norm(x)
    S = x.size(1)
    e = norm(decoder.embed(answer))                                    # (B, A, C)

    def network(h):
        streams = h.size(1) // A
        own = S + torch.arange(A, device=x.device).repeat(streams)     # (T,)
        position = torch.cat([torch.arange(S, device=x.device), own])  # (S + T,)
        time = position.clamp(min=S - 1) if c.prefix_lm else position  # all of x is one time, or many
        mask = hide(time[:, None] < time, x.dtype)                     # (S + T, S + T)
        rope = rotations(position[None], c.n_embd // c.n_head)
        both = torch.cat([x, h], dim=1)                                # (B, S + T, C)
        for block in decoder.blocks:
            both, _ = block(both, rope, mask)
        return carry(both[:, S:])                                      # (B, T, C)

    def carry(h):
        return norm(h) if c.norm == 'pre' else h

    y = norm(decoder.y_start).expand_as(e) if c.recursion == 'add' else e
    z = None if c.recursion == 'loop' else norm(decoder.z_start).expand_as(e)
    for cycle in range(c.outer_steps):
        last = cycle == c.outer_steps - 1
        with torch.set_grad_enabled(last and torch.is_grad_enabled()):
            for _ in range(c.inner_steps):
                if c.recursion == 'concat':
                    told = norm(y + e) if c.recall else y              # (B, A, C)
                    y, z = network(torch.cat([told, z], dim=1)).chunk(2, dim=1)    # (B, A, C) both
                elif c.recursion == 'add':
                    z = network(carry(e + y + z))
                elif c.recursion == 'loop':
                    y = network(norm(y + e) if c.recall else y)
                else:
                    raise ValueError(f'recursion={c.recursion}: has no branch in naive_logits')
            if c.recursion == 'add':
                y = network(carry(y + z))
    return decoder.head(y)


def naive_generate(decoder, vision, question, max_new_tokens):
    """Greedy generation that runs `naive_logits` over everything for every token. -> (B, max_new_tokens)"""
    answer = torch.full((len(question), 1), decoder.config.bos_id, device=question.device)
    for _ in range(max_new_tokens):
        logits = naive_logits(decoder, vision, question, answer)       # (B, A, V)
        token = logits[:, -1:].argmax(-1)                              # (B, 1)
        answer = torch.cat([answer, token], dim=1)
    return answer[:, 1:]
