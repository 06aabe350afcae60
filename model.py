"""
The decoders: a plain transformer, and a TRM that recurs on an answer state y and a latent state z.

    B batch   N image tokens   Q question tokens   A answer tokens   S = N + Q context tokens   T any of these lengths
    C width (n_embd)   D vision_dim   V vocabulary   nh heads   hs head size
    x context [image | question], fixed     y answer state (z_H in the reference code)     z latent state (z_L)
    inner_steps: n in the paper (L_cycles)  outer_steps: T in the paper (H_cycles)

Both decoders are the same network F, a stack of blocks, and differ in what they do with it. F runs over the context once
and keeps its keys and values. The plain decoder then runs F once over the answer y. The TRM runs F again and again over its
states, reading the same context: x never sees y or z, so what it offers them is the same in every step.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    kind: str = 'trm'           # 'plain': F once over y; 'trm': F again and again over y and z
    vocab_size: int = 512       # V
    n_layer: int = 2            # blocks in F
    n_head: int = 4             # attention heads
    n_embd: int = 128           # C
    vision_dim: int = 128       # D, dimensions of an image token
    recursion: str = 'concat'   # 'concat': F([y ; z]) updates both; 'add': z <- F(x + y + z), then y <- F(y + z)
    inner_steps: int = 4        # n, steps of a cycle
    outer_steps: int = 1        # T, cycles; all but the last run without gradient
    use_vision: bool = True     # false: the blind control, which never sees the picture
    prefix_lm: bool = True      # context tokens see each other both ways; false: causally, as in the seed
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self):
        for key, allowed in dict(kind=('plain', 'trm'), recursion=('concat', 'add')).items():
            if getattr(self, key) not in allowed:
                raise ValueError(f'{key}={getattr(self, key)}: expected one of {", ".join(allowed)}')
        for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'vision_dim', 'inner_steps', 'outer_steps'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least 1')
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f'n_embd={self.n_embd}: expected a multiple of 2 * n_head = {2 * self.n_head}')


def norm(x):
    """Layer norm over the last dimension, without weights: mean 0 and RMS 1. On a CPU it is faster than the RMS norm."""
    return F.layer_norm(x, (x.size(-1),))


def rotations(positions, head_size):
    """RoPE: the cosines and sines that turn queries and keys by their positions. Shapes: (B, T) -> two (B, 1, T, hs / 2)."""
    freqs = 10000 ** -(torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angles = positions[:, None, :, None] * freqs
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)                                          # (B, nh, T, hs / 2) both
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention, written out. A token sees its own stream under a mask and, if there is one, the whole context."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, h, rope, mask, context=None):
        """
        Shapes: h (B, T, C); mask (T, T) or (B, 1, 1 or T, T), 0 where a token may look and -inf where not;
            context, of this layer: keys (B, nh, S, hs), values (B, nh, S, hs), mask (B, 1, 1, S)
            -> h (B, T, C), keys and values (B, nh, T, hs)
        """
        B, T, C = h.shape
        q, k, v = self.qkv(h).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        q, k = rotate(q, *rope) * (C // self.n_head) ** -.5, rotate(k, *rope)
        att = q @ k.transpose(-2, -1) + mask                           # (B, nh, T, T)
        if context is None:
            y = att.softmax(-1) @ v                                    # (B, nh, T, hs)
        else:  # one softmax over both; the parts are multiplied apart, which spares copying the context
            keys, values, context_mask = context
            att = torch.cat([q @ keys.transpose(-2, -1) + context_mask, att], dim=-1).softmax(-1)  # (B, nh, T, S + T)
            S = keys.size(2)
            y = att[..., :S] @ values + att[..., S:] @ v               # (B, nh, T, hs)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), (k, v)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, h, rope, mask, context=None):
        attended, kv = self.attention(norm(h), rope, mask, context)
        h = h + attended
        return h + self.fc2(F.gelu(self.fc1(norm(h)))), kv


class Decoder(nn.Module):
    """Answers questions about pictures, plainly or recursively; see the head of this page and `forward`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.embed = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        if config.use_vision:
            self.vision_proj = nn.Linear(config.vision_dim, C)
        if config.kind == 'trm':
            self.z_start = nn.Parameter(torch.randn(C))
            if config.recursion == 'add':
                self.y_start = nn.Parameter(torch.randn(C))
        for p in self.parameters():
            if p.dim() == 2:  # keeps the scale of what goes through; at this width GPT-2's .02 would shrink it
                nn.init.normal_(p, std=p.size(1) ** -.5)
        nn.init.normal_(self.embed.weight, std=.02)
        for block in self.blocks:  # what is added to the residual stream starts small, as in GPT-2
            for p in (block.attention.out.weight, block.fc2.weight):
                nn.init.normal_(p, std=(p.size(1) * 2 * config.n_layer) ** -.5)

    def forward(self, vision, question, answer, targets=None):
        """Predicts every answer token from the picture, the question and the tokens before it.

        Shapes: vision (B, N, D), ignored (may be None) without use_vision; question (B, Q), padded on the right with pad_id;
            answer (B, A), starting with bos_id; targets (B, A), ending with eos_id, -100 where there is nothing to predict
            -> logits (B, A, V), loss: nats per target, mean over the batch, or None without targets
        """
        logits = self.head(self.answer_states(self.read_context(vision, question), answer))        # (B, A, V)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return logits, loss

    def read_context(self, vision, question):
        """Runs F over x = [image | question] once. -> keys, values and mask for every layer, and the number of tokens (B,)."""
        x = self.embed(question)                                       # (B, Q, C)
        seen = question != self.config.pad_id                          # (B, Q)
        if self.config.use_vision:
            image = self.vision_proj(vision.type_as(x))                # (B, N, C)
            x, seen = torch.cat([image, x], dim=1), F.pad(seen, (image.size(1), 0), value=True)    # (B, S, C), (B, S)
        mask = hide(~seen[:, None, None, :], x.dtype)                  # (B, 1, 1, S): nobody looks at padding
        positions = torch.arange(x.size(1), device=x.device)           # padding is on the right: positions count real tokens
        mask_x = mask if self.config.prefix_lm else mask + hide(positions[:, None] < positions, x.dtype)
        rope = rotations(positions[None], x.size(2) // self.config.n_head)
        h, layers = norm(x), []
        for block in self.blocks[:-1]:
            h, kv = block(h, rope, mask_x)
            layers.append((*kv, mask))
        layers.append((*self.last_kv(h, rope), mask))
        return layers, seen.sum(1)

    def last_kv(self, h, rope):
        """Keys and values of the last layer, the only thing that it has to do for the context."""
        attention, C = self.blocks[-1].attention, h.size(2)
        k, v = F.linear(norm(h), attention.qkv.weight[C:]).unflatten(2, (2, attention.n_head, -1)).permute(2, 0, 3, 1, 4)
        return rotate(k, *rope), v                                     # (B, nh, S, hs) both

    def answer_states(self, context, answer):
        """Runs the decoder over the answer positions. Shapes: answer (B, A) -> y (B, A, C), from which the head predicts."""
        layers, n_context = context
        c, A = self.config, answer.size(1)
        e = norm(self.embed(answer))                                   # (B, A, C)
        time = torch.arange(A, device=answer.device)                   # a state of time t sees states of times <= t
        if c.kind == 'trm' and c.recursion == 'concat':
            time = time.repeat(2)                                      # y_t and z_t share their time and their position
        mask = hide(time[:, None] < time, e.dtype)
        rope = rotations(n_context[:, None] + time, c.n_embd // c.n_head)

        def network(h):
            for block, layer in zip(self.blocks, layers):
                h, _ = block(h, rope, mask, layer)
            return norm(h)  # also what keeps the states bounded, however often they come round

        def cycle(y, z):
            for _ in range(c.inner_steps):
                if c.recursion == 'concat':
                    y, z = network(torch.cat([y, z], dim=1)).chunk(2, dim=1)
                else:
                    z = network(norm(e + y + z))
            return (y, z) if c.recursion == 'concat' else (network(norm(y + z)), z)

        if c.kind == 'plain':
            return network(e)
        y = e if c.recursion == 'concat' else norm(self.y_start).expand_as(e)
        z = norm(self.z_start).expand_as(e)
        with torch.no_grad():
            for _ in range(c.outer_steps - 1):
                y, z = cycle(y, z)
        return cycle(y, z)[0]                                          # the gradient goes through the whole last cycle

    @torch.no_grad()
    def generate(self, vision, question, max_new_tokens, temperature=0.0, top_k=None, generator=None):
        """Answers token by token, greedily at temperature 0, else by drawing from the top_k likeliest tokens.

        Shapes: as `forward` -> (B, max_new_tokens), every answer up to and with eos_id, pad_id after it.
        """
        c, context, B = self.config, self.read_context(vision, question), len(question)
        answer = torch.full((B, 1), c.bos_id, device=question.device)
        done = torch.zeros(B, dtype=torch.bool, device=question.device)
        for _ in range(max_new_tokens):
            logits = self.head(self.answer_states(context, answer)[:, -1]).float()                 # (B, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                if top_k:
                    logits[logits < logits.topk(min(top_k, c.vocab_size)).values[:, -1:]] = -torch.inf
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            token = token.masked_fill(done, c.pad_id)
            answer, done = torch.cat([answer, token[:, None]], dim=1), done | (token == c.eos_id)
            if done.all():
                break
        return F.pad(answer[:, 1:], (0, max_new_tokens + 1 - answer.size(1)), value=c.pad_id)

    def parameter_counts(self):
        """Parameters by part: {'core': blocks and start states, 'embedding': tied with the head, 'vision_proj': ..., 'total': ...}."""
        total = sum(p.numel() for p in self.parameters())
        embedding = self.embed.weight.numel()
        vision = sum(p.numel() for p in self.vision_proj.parameters()) if self.config.use_vision else 0
        return dict(core=total - embedding - vision, embedding=embedding, vision_proj=vision, total=total)


def hide(hidden, dtype):
    """A mask to add to attention scores: -inf where `hidden`, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, -torch.inf)


def build_model(config):
    """A decoder with fresh weights, drawn from torch's current seed."""
    return Decoder(config)
