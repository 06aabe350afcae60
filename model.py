"""
The decoders: a plain transformer, and a TRM that recurs on an answer state y and a latent state z.

    B batch   N image tokens   Q question tokens   A answer tokens   S = N + Q context tokens   T any length
    C width (n_embd)   D vision_dim   V vocabulary   nh heads   hs head size
    x context [image | question], fixed     y answer state (z_H in the reference code)     z latent state (z_L)
    inner_steps: n in the paper (L_cycles)  outer_steps: its T (H_cycles)

Both decoders are the same network F, a stack of blocks, and differ in what they do with it. F runs over the context once
and keeps its keys and values. The plain decoder then runs F once over the answer y. The TRM runs F again and again over its
states, reading the same context: x never sees y or z, so what it offers them is the same in every step.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import expect


@dataclass
class ModelConfig:
    kind: str = 'trm'           # 'plain': F once over y; 'trm': F again and again over y and z
    vocab_size: int = 512       # V
    n_layer: int = 2            # blocks in F
    n_head: int = 4             # attention heads
    n_embd: int = 128           # C
    vision_dim: int = 128       # D, dimensions of an image token
    recursion: str = 'concat'   # 'concat': F([y ; z]) updates both; 'add': z <- F(x + y + z), then y <- F(y + z);
                                # 'loop': y <- F(y), without z: a plain decoder that shares its weights over the steps
    inner_steps: int = 4        # n, steps of a cycle
    outer_steps: int = 1        # T, cycles
    shared: bool = True         # the steps share their blocks; false: each has n_layer of its own, and reads with them what the first ones read of x
    deep_supervision: bool = False      # every cycle is trained on, each from where the last one ended; false: the last one only
    checkpoint_recursion: bool = False  # recompute the steps in the backward pass instead of keeping them: less memory, more time
    norm: str = 'pre'           # 'pre': blocks norm what they read, F what it hands on; 'post': blocks norm what they hand on;
                                # 'unbounded': as 'pre', but F hands on what it has, and the states grow
    use_vision: bool = True     # false: the blind control, which never sees the picture
    prefix_lm: bool = True      # context tokens see each other both ways; false: causally, as in Edge-Glass
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self):
        expect(self, kind=('plain', 'trm'), recursion=('concat', 'add', 'loop'), norm=('pre', 'post', 'unbounded'))
        for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'vision_dim', 'inner_steps', 'outer_steps'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least 1')
        if self.kind == 'plain':                # the loop, once
            self.recursion, self.inner_steps, self.outer_steps = 'loop', 1, 1
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f'n_embd={self.n_embd}: expected a multiple of 2 * n_head = {2 * self.n_head}')
        if not self.shared and self.outer_steps > 1 and not self.deep_supervision:
            raise ValueError('shared=False with several cycles: the blocks of all but the last one would never be trained; give deep_supervision=True')

    @property
    def calls(self):
        """How often F runs over the states."""
        return self.outer_steps * (self.inner_steps + (self.recursion == 'add'))

    @property
    def streams(self):
        """States for an answer position that go through F together: y and z, or one of them."""
        return 2 if self.recursion == 'concat' else 1


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


def cross_entropy(logits, targets):
    """Shapes: logits (B, A, V), targets (B, A) -> mean nats per target that is not -100 (nan if none is), in float32 or better."""
    return F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


class Attention(nn.Module):
    """Multi-head attention, written out. A token sees its own stream under a mask and, if there is one, the whole context."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, h, rope, mask, context=None, past=None):
        """
        Shapes: h (B, T, C); mask (T, P + T) or (B, 1, 1 or T, T), 0 where a token may look and -inf where not;
            context, of this layer: keys (B, nh, S, hs), values (B, nh, S, hs), mask (B, 1, 1, S);
            past: memory for keys and values (2, B, nh, P + T or more, hs), and P, how many it holds; those of h are added
            -> h (B, T, C), keys and values (B, nh, P + T, hs), attention (B, nh, T, [S +] P + T)
        """
        B, T, C = h.shape
        qkv = self.qkv(h).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)      # (3, B, nh, T, hs)
        (q, k), v = rotate(qkv[:2], *rope), qkv[2]                     # (B, nh, T, hs) each
        q = q * (C // self.n_head) ** -.5
        if past is not None:
            memory, P = past
            memory[:, :, :, P:P + T] = torch.stack([k, v])
            k, v = memory[:, :, :, :P + T]                             # (B, nh, P + T, hs) both
        att = q @ k.transpose(-2, -1) + mask                           # (B, nh, T, P + T)
        if context is None:
            att = att.softmax(-1)
            y = att @ v                                                # (B, nh, T, hs)
        else:  # one softmax over both; the parts are multiplied apart, which spares copying the context
            keys, values, context_mask = context
            att = torch.cat([q @ keys.transpose(-2, -1) + context_mask, att], dim=-1).softmax(-1)  # (B, nh, T, S + P + T)
            S = keys.size(2)
            y = att[..., :S] @ values + att[..., S:] @ v               # (B, nh, T, hs)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), (k, v), att


class Block(nn.Module):
    """A transformer block, with its norms before or after attention and MLP."""

    def __init__(self, config):
        super().__init__()
        self.before, self.after = (nn.Identity(), norm) if config.norm == 'post' else (norm, nn.Identity())
        self.attention = Attention(config)
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, h, rope, mask, context=None, past=None):
        """Shapes: as `Attention` -> h (B, T, C), keys and values, attention."""
        attended, kv, att = self.attention(self.before(h), rope, mask, context, past)
        h = self.after(h + attended)
        return self.after(h + self.fc2(F.gelu(self.fc1(self.before(h))))), kv, att


class Decoder(nn.Module):
    """Answers questions about pictures, plainly or recursively; see the head of this page and `forward`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.embed = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer * (1 if config.shared else config.calls)))
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        if config.use_vision:
            self.vision_proj = nn.Linear(config.vision_dim, C)
        if config.recursion != 'loop':
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
            -> logits (B, A, V), loss: nats per target, mean over the batch (and the supervised cycles), or None without targets
        """
        states = self.answer_states(self.read_context(vision, question), answer)
        if targets is None:
            return self.head(states[-1]), None
        logits = [self.head(y) for y in states]                        # (B, A, V) each
        return logits[-1], sum(cross_entropy(l, targets) for l in logits) / len(logits)

    def read_context(self, vision, question):
        """Runs F over x = [image | question] once. -> keys, values and mask for every block, and the number of tokens (B,)."""
        c = self.config
        x = self.embed(question)                                       # (B, Q, C)
        seen = question != c.pad_id                                    # (B, Q)
        if c.use_vision:
            image = self.vision_proj(vision.type_as(x))                # (B, N, C)
            x, seen = torch.cat([image, x], dim=1), F.pad(seen, (image.size(1), 0), value=True)    # (B, S, C), (B, S)
        mask = hide(~seen[:, None, None, :], x.dtype)                  # (B, 1, 1, S): nobody looks at padding
        positions = torch.arange(x.size(1), device=x.device)           # padding is on the right: positions count real tokens
        mask_x = mask if c.prefix_lm else mask + hide(positions[:, None] < positions, x.dtype)
        rope = rotations(positions[None], x.size(2) // c.n_head)
        read, layers = [norm(x)], []                                   # what the layers of F read
        for block in self.blocks[:c.n_layer - 1]:
            h, kv, _ = block(read[-1], rope, mask_x)
            read.append(h)
            layers.append((*kv, mask))
        for i, block in enumerate(self.blocks[c.n_layer - 1:], c.n_layer - 1):
            layers.append((*self.keys_values(block, read[i % c.n_layer], rope), mask))
        return layers, seen.sum(1)

    def keys_values(self, block, h, rope):
        """A block's keys and values of the context, the only thing that the last one, or one of a later step, has to do for it."""
        k, v = F.linear(block.before(h), block.attention.qkv.weight[h.size(2):]).unflatten(2, (2, self.config.n_head, -1)).permute(2, 0, 3, 1, 4)
        return rotate(k, *rope), v                                     # (B, nh, S, hs) both

    def answer_states(self, context, answer, past=None, start=0, watch=None):
        """Runs the decoder over answer positions.

        Shapes: context, from `read_context`; answer (B, A), the positions from `start` on; past, from `fresh_past`, holds what
            comes before them, and they are added; watch, a list to which every call of F adds its states (B, T, C) and, for each
            block, its attention (B, nh, T, S + T)
            -> y (B, A, C) at the end of every cycle that is trained on, a list; the head predicts from the last one
        """
        layers, n_context = context
        c, A = self.config, answer.size(1)
        e = norm(self.embed(answer))                                   # (B, A, C)
        when = torch.arange(A, device=answer.device).repeat(c.streams)  # y_t and z_t share their time and their position
        mask = F.pad(hide(when[:, None] < when, e.dtype), (c.streams * start, 0))  # a state of time t sees states of times <= t
        rope = rotations(n_context[:, None] + start + when, c.n_embd // c.n_head)
        calls = iter(range(c.calls))
        bounded = norm if c.norm == 'pre' else nn.Identity()           # 'post': they are already; 'unbounded': they are not

        def network(h, call):
            seen, first = [], 0 if c.shared else call * c.n_layer
            memories = [None] * c.n_layer if past is None else past[call]
            for block, layer, memory in zip(self.blocks[first:], layers[first:], memories):
                h, _, att = block(h, rope, mask, layer, None if memory is None else (memory, c.streams * start))
                seen.append(att)
            h = bounded(h)
            if watch is not None:
                watch.append((h, seen))
            return h

        def cycle(h):                                                  # h: [y ; z], or y alone without z
            if c.recursion == 'add':
                y, z = h.chunk(2, dim=1)
                for _ in range(c.inner_steps):
                    z = step(bounded(e + y + z), next(calls))
                return torch.cat([step(bounded(y + z), next(calls)), z], dim=1)
            for _ in range(c.inner_steps):
                h = step(h, next(calls))
            return h

        step = partial(checkpoint, network, use_reentrant=False) if c.checkpoint_recursion and torch.is_grad_enabled() else network
        y = norm(self.y_start).expand_as(e) if c.recursion == 'add' else e
        h = y if c.recursion == 'loop' else torch.cat([y, norm(self.z_start).expand_as(e)], dim=1)
        ends = []
        for t in range(c.outer_steps):  # the gradient goes through a whole cycle and not beyond it
            trained = c.deep_supervision or t == c.outer_steps - 1
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                h = cycle(h if t == 0 else h.detach())
            if trained:
                ends.append(self.read_out(h[:, :A]))
        return ends

    def read_out(self, y):
        return norm(y) if self.config.norm == 'unbounded' else y

    def fresh_past(self, context, length):
        """Memory for keys and values of `length` answer positions: (calls of F, n_layer, 2, B, nh, T, hs), T = streams * length."""
        c, keys = self.config, context[0][0][0]                        # (B, nh, S, hs)
        return keys.new_empty(c.calls, c.n_layer, 2, len(keys), c.n_head, c.streams * length, keys.size(3))

    @torch.no_grad()
    def generate(self, vision, question, max_new_tokens, temperature=0.0, top_k=None, generator=None):
        """Answers token by token, greedily at temperature 0, else by drawing from the top_k likeliest tokens. What position t computes
        in a call of F depends on positions up to t alone, so a token costs one position: the keys and values before it are kept.

        Shapes: as `forward` -> (B, max_new_tokens), every answer up to and with eos_id, pad_id after it.
        """
        c, context, B = self.config, self.read_context(vision, question), len(question)
        past = self.fresh_past(context, max_new_tokens)
        answer = torch.full((B, max_new_tokens + 1), c.pad_id, device=question.device)
        answer[:, 0] = c.bos_id
        done = torch.zeros(B, dtype=torch.bool, device=question.device)
        for t in range(max_new_tokens):
            logits = self.head(self.answer_states(context, answer[:, t:t + 1], past, start=t)[-1][:, 0]).float()  # (B, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                if top_k:
                    logits[logits < logits.topk(min(top_k, c.vocab_size)).values[:, -1:]] = -torch.inf
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            answer[:, t + 1] = token.masked_fill(done, c.pad_id)
            done |= token == c.eos_id
            if done.all():
                break
        return answer[:, 1:]

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
