"""
The decoders: a plain transformer, and a TRM (tiny recursive model) that recurs on an answer y and a latent z.

    x = [image | sound | question]                     # the context, once: its keys and values are kept
    e = embed(answer so far)                           # the tokens that are written, <bos> first
    y = e                                              # the answer state, one for each answer position
    z = a learned vector, the same at each position    # the latent state: a scratchpad
    repeat n times:                                    # one pass, with the same two blocks F every time
        y, z = F([y + e ; z]), looking at x            # 'concat'; without recall, config/trm.py, F([y ; z])
    logits = head(y)

Read ModelConfig, Attention, Block, then Decoder: forward, read_context, answer_states (the recursion, and two
others) and generate, for which a Cache keeps what was computed before. Skip the part on pretrained language
models at first; what they need elsewhere is marked 'rms', for their norm, or recur_layers.

    B batch   N image, M sound tokens   Q question tokens   A answer tokens   S = N + M + Q context tokens
    T states that go through F together: A of y, or A of y, then A of z   P answer states before them
    C width (n_embd)   D vision_dim, of sounds sound_dim   V vocabulary   hs size of a head   nh heads
    kv heads of keys and values   In the paper's code y is z_H, z is z_L, its x is e; inner_steps is its n,
    outer_steps its T
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import expect
from plumbing.caches import Cache, Halting, NoCache
from pretrained.decoders import read_decoder

# how a pass changes y and z; a new way is a name here and a branch in Decoder.answer_states
RECURSIONS = ('concat', 'add', 'loop')


@dataclass
class ModelConfig:
    kind: str = 'trm'           # 'plain': F once over y; 'trm': F again and again over y, and z if it has one
    vocab_size: int = 512       # V
    n_layer: int = 2            # blocks: F is all of them
    n_head: int = 4             # nh, attention heads
    n_kv_head: int | None = None    # kv, heads of keys and values, which queries share; None: n_head
    n_embd: int = 128           # C
    vision_dim: int = 128       # D, dimensions of an image token
    recursion: str = 'concat'   # 'concat': F([y + e ; z]) updates both; 'loop': y <- F(y + e), without z;
                                # 'add': z <- F(e + y + z) n times, then y <- F(y + z)
    recall: bool = True         # e comes in at every pass; false: at the first alone. 'add' always has it
    inner_steps: int = 4        # n, passes of a cycle; 'add' makes one more, for y
    outer_steps: int = 1        # cycles
    deep_supervision: bool = False      # every cycle is trained on; false: the last one only
    checkpoint_recursion: bool = False  # recompute the passes in the backward pass: less memory, more time
    norm: str = 'post'          # 'post': blocks norm what they hand on; 'pre': what they read;
                                # 'rms', for pretrained weights alone: LlamaBlock, and passes through gates
    qk_norm: bool = True        # queries and keys are normed, head by head
    use_vision: bool = True     # false: the blind control, which never sees the picture
    use_sound: bool = False     # false: the deaf control, which never hears the sound
    sound_dim: int = 128        # dimensions of a sound token
    prefix_lm: bool = True      # context tokens see each other both ways; false: causally
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    # what pretrained decoders need
    head_size: int | None = None        # hs; None: C / nh
    mlp_size: int | None = None         # width inside an MLP; None: 4 C
    qkv_bias: bool = False
    rope_freqs: tuple | None = None     # radians a position, one for each pair; None: 10000 ** (-2 i / hs)
    norm_eps: float = 1e-5              # of 'rms'
    tied_head: bool = True              # the head's weights are the embedding's
    checkpoint_blocks: bool = False     # recompute every block in the backward pass: for deep decoders
    recur_layers: int | None = None     # of 'rms': F is the last ones, those before are passed once

    def __post_init__(self):
        expect(self, kind=('plain', 'trm'), recursion=RECURSIONS, norm=('pre', 'post', 'rms'))
        for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'vision_dim', 'inner_steps', 'outer_steps'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least 1')
        # RoPE turns the numbers of a head in pairs, so its size must be even
        if self.head_size is None:
            if self.n_embd % (2 * self.n_head):
                raise ValueError(f'n_embd={self.n_embd}: expected a multiple of 2 * n_head = '
                                 f'{2 * self.n_head}')
            self.head_size = self.n_embd // self.n_head
        if self.mlp_size is None:
            self.mlp_size = 4 * self.n_embd
        if self.kind == 'plain':  # the plain decoder is the loop, taken once
            self.recursion = 'loop'
            self.inner_steps = 1
            self.outer_steps = 1
            self.recall = False  # there is only a first pass
            self.recur_layers = None
        if self.recur_layers is None:
            self.recur_layers = self.n_layer
        if not 1 <= self.recur_layers <= self.n_layer:
            raise ValueError(f'recur_layers={self.recur_layers}: expected 1 to n_layer={self.n_layer}')
        if self.recur_layers < self.n_layer and self.norm != 'rms':
            raise ValueError(f"recur_layers={self.recur_layers}: goes with norm='rms', pretrained blocks")
        if self.has_gates and (self.recursion == 'add' or not self.recall):
            raise ValueError(f'recursion={self.recursion}, recall={self.recall}: expected loop or concat, '
                             'and recall, where the blocks are pretrained')
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f'n_kv_head={self.n_kv_head}: expected a divisor of n_head={self.n_head}')

    @property
    def has_gates(self):
        """Whether what a pass makes enters the next one through gates: where the blocks are pretrained."""
        return self.kind == 'trm' and self.norm == 'rms'

    @property
    def streams(self):
        """States of an answer position that go through F side by side: y and z, or one of them."""
        return 2 if self.recursion == 'concat' else 1


def norm(x):
    """Layer norm without weights: mean 0 and RMS 1. On a CPU it is faster than an RMS norm."""
    return F.layer_norm(x, (x.size(-1),))


def rotations(positions, head_size, freqs=None):
    """RoPE: cosines and sines that turn queries and keys by their positions, and scale them.

    Shapes: positions (B, T); freqs, the angle of one position, (hs / 2,) or None -> two (B, 1, T, hs)
    """
    # float32 even under autocast: bfloat16 could not tell far positions apart
    if freqs is None:
        freqs = 10000 ** -(torch.arange(0, head_size, 2, device=positions.device) / head_size)     # (hs / 2,)
    angles = positions[:, None, :, None] * freqs                       # (B, 1, T, hs / 2)
    # scores are divided by the root of hs: queries and keys by hs ** .25 each
    scale = head_size ** -.25
    cos = scale * angles.cos()
    sin = scale * angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)   # (B, 1, T, hs) both


def rotate(x, rope):
    """Turns and scales queries or keys (B, any, T, hs) by `rotations`."""
    cos, sin = rope
    # number i of the first half and number i of the second are a point in the plane
    other = x.roll(x.size(-1) // 2, dims=-1)                           # (B, any, T, hs)
    return torch.addcmul(x * cos.type_as(x), other, sin.type_as(x))


def hide(hidden, dtype):
    """A mask to add to attention scores: -inf where `hidden`, else 0."""
    # -inf, not a large number: what is hidden gets a weight of exactly 0
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill(hidden, -torch.inf)


def cross_entropy(logits, targets):
    """Mean nats per target that is not -100 (nan if none is), in float32 or better.

    Shapes: logits (B, A, V), targets (B, A) -> a scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())    # (B * A, V) and (B * A,)


class Attention(nn.Module):
    """Attention, written out; heads of queries may share keys and values. Source: Ainslie 2023 (grouped-query
    attention, arXiv 2305.13245); kv = 1 is Shazeer's multi-query attention, 2019."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_size = config.head_size
        self.qk_norm = config.qk_norm
        n_heads = self.n_head + 2 * self.n_kv_head  # of queries, keys and values
        self.qkv = nn.Linear(config.n_embd, n_heads * self.head_size, bias=config.qkv_bias)
        self.out = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=False)
        self.qk_scale = None  # learned with 'rms': the heads of queries, then those of keys (nh + kv, 1, hs)
        if config.qk_norm and config.norm == 'rms':
            self.qk_scale = nn.Parameter(torch.ones(self.n_head + self.n_kv_head, 1, self.head_size))
            self.norm_eps = config.norm_eps

    def forward(self, h, rope, mask, past=None):
        """
        Shapes: h (B, T, C); mask, added to the scores, (B, 1, T or 1, S + P + T); past, keys and values of
            the context and of P states before these, (B, kv, S + P, hs) both -> (B, T, C); all keys and
            values, (B, kv, S + P + T, hs) both. The context itself has no past: then S + P is 0
        """
        q, k, v = self.queries_keys_values(h, rope)                    # (B, nh or kv, T, hs) each
        if past is not None:
            k = torch.cat([past[0], k], dim=2)                         # (B, kv, S + P + T, hs)
            v = torch.cat([past[1], v], dim=2)                         # (B, kv, S + P + T, hs)
        att = self.attention_weights(q, k, mask)                       # (B, nh, T, S + P + T)
        found = shared_product(att, v)                                 # (B, nh, T, hs)
        return self.out(found.transpose(1, 2).flatten(2)), (k, v)      # (B, T, C)

    def queries_keys_values(self, h, rope):
        """Shapes: h (B, T, C) -> queries (B, nh, T, hs), keys and values, (B, kv, T, hs) both."""
        heads = self.heads_of(self.qkv(h))                             # (B, nh + 2 kv, T, hs)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)
        # values are not turned: positions decide who looks at whom, not what is read there
        q, k = self.turned(qk, rope).split((self.n_head, self.n_kv_head), dim=1)
        return q, k, v

    def keys_values(self, h, rope):
        """Keys and values alone: all that the context's last layer is asked for. -> (B, kv, T, hs) both"""
        n = self.n_head * self.head_size  # rows that make queries
        bias = None if self.qkv.bias is None else self.qkv.bias[n:]
        kv = F.linear(h, self.qkv.weight[n:], bias)                    # (B, T, 2 kv hs)
        k, v = self.heads_of(kv).chunk(2, dim=1)
        return self.turned(k, rope), v                                 # (B, kv, T, hs) both

    def turned(self, heads, rope):
        """Queries or keys at their positions, normed with qk_norm. Shapes: (B, any, T, hs) -> the same."""
        if self.qk_scale is not None:
            heads = F.rms_norm(heads, (self.head_size,), eps=self.norm_eps)
            heads = heads * self.qk_scale[-heads.size(1):]             # keys alone have the last of them
        elif self.qk_norm:  # of RMS 1 no score gets large, and more is learnt: results/minutes.md
            heads = norm(heads)
        return rotate(heads, rope)

    def heads_of(self, x):
        """Shapes: (B, T, n * hs) -> (B, n, T, hs)."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2).contiguous()

    def attention_weights(self, q, k, mask):
        """Who looks at whom, and how much. Shapes: q (B, nh, T, hs), k (B, kv, T', hs) -> (B, nh, T, T')."""
        # without the usual root of hs: `rotations` has scaled both
        scores = shared_product(q, k.mT) + mask                        # (B, nh, T, T')
        return scores.softmax(-1)


def shared_product(a, b):
    """a @ b, where heads of a share those of b.
    Shapes: a (B, nh, T, m), b (B, kv, m, n) -> (B, nh, T, n)"""
    B, nh, T, m = a.shape
    # the heads that share one are rows of one product
    rows = a.reshape(B, b.size(1), -1, m)                              # (B, kv, nh / kv * T, m)
    return (rows @ b).view(B, nh, T, -1)                               # (B, nh, T, n)


class Block(nn.Module):
    """A transformer block, with its norms before or after attention and MLP."""

    def __init__(self, config):
        super().__init__()
        self.norm = config.norm
        self.attention = Attention(config)
        self.fc1 = nn.Linear(config.n_embd, config.mlp_size, bias=False)
        self.fc2 = nn.Linear(config.mlp_size, config.n_embd, bias=False)

    def forward(self, h, rope, mask, past=None):
        """Shapes: as Attention."""
        if self.norm == 'pre':
            attended, kept = self.attention(norm(h), rope, mask, past)
            h = h + attended
            return h + self.mlp(norm(h)), kept
        elif self.norm == 'post':
            attended, kept = self.attention(h, rope, mask, past)
            # RMS 1 after each half: any number of passes stays bounded without another norm
            h = norm(h + attended)
            return norm(h + self.mlp(h)), kept
        else:
            raise ValueError(f'norm={self.norm}: expected pre or post')

    def mlp(self, h):
        return self.fc2(F.gelu(self.fc1(h)))                           # (B, T, C)

    def keys_values(self, h, rope):
        """The keys and values that `forward` would make of h alone, (B, kv, T, hs) both."""
        return self.attention.keys_values(norm(h) if self.norm == 'pre' else h, rope)


@dataclass
class Context:
    """x = [image | sound | question], run through all blocks once: what answers look at in every pass."""
    layers: list          # for each block keys and values, (B, kv, S, hs) both
    mask: torch.Tensor    # to add to attention scores, (B, 1, 1, S): -inf at padding
    length: torch.Tensor  # tokens that are not padding (B,)


class Decoder(nn.Module):
    """Answers questions about pictures and sounds, plainly or recursively."""

    block = Block

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.embed = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.n_layer))     # F
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        if config.use_vision:
            self.vision_proj = nn.Linear(config.vision_dim, C)
        if config.use_sound:
            self.sound_proj = nn.Linear(config.sound_dim, C)
        if config.recursion != 'loop':  # there z would never get a gradient
            self.z_start = nn.Parameter(torch.randn(C))
        if config.recursion == 'add':  # elsewhere y starts as e, which a pass of 'add' has beside y
            self.y_start = nn.Parameter(torch.randn(C))
        freqs = None if config.rope_freqs is None else torch.tensor(config.rope_freqs)     # (hs / 2,)
        self.register_buffer('rope_freqs', freqs, persistent=False)

        for p in self.parameters():
            if p.dim() == 2:  # keeps the scale of what goes through; here GPT-2's .02 would shrink it
                nn.init.normal_(p, std=p.size(1) ** -.5)
        # our blocks read it through a norm, so only the head feels it: the first loss is near log V
        nn.init.normal_(self.embed.weight, std=.02)
        for block in self.blocks:  # what is added to the residual stream starts small, as in GPT-2
            for p in (block.attention.out.weight, block.fc2.weight):
                nn.init.normal_(p, std=(p.size(1) * 2 * config.n_layer) ** -.5)

    def forward(self, vision, question, answer, targets=None, inner_steps=None, sound=None):
        """Predicts every answer token from picture, sound, question and the tokens before it.

        Shapes: vision (B, N, D) and sound (B, M, sound_dim), None where the rows have none; question (B, Q),
            padded on the right with pad_id; answer (B, A), starting with bos_id; targets (B, A), ending with
            eos_id, -100 where there is nothing to predict; inner_steps, another number of passes than the
            config's -> logits (B, A, V), and loss: nats per target, the mean over the batch and the
            supervised cycles, or None without targets. Padding of answers comes later than all that counts
        """
        context = self.read_context(vision, question, sound)
        cycles = self.answer_states(context, answer, inner_steps=inner_steps)      # y (B, A, C) of each
        if targets is None:
            return self.head(cycles[-1]), None
        logits = [self.head(y) for y in cycles]                        # (B, A, V) each
        losses = [cross_entropy(of_cycle, targets) for of_cycle in logits]
        # the mean, not the sum: a loss of the same size however many cycles there are
        return logits[-1], sum(losses) / len(losses)                   # (B, A, V) and a scalar

    def read_context(self, vision, question, sound=None):
        """Runs all blocks over x = [image | sound | question] once; what rows lack is left out. x never sees
        y or z: this serves every pass. -> Context"""
        c = self.config
        x = self.embed(question)                                       # (B, Q, C)
        real = question != c.pad_id                                    # (B, Q)
        if c.use_sound and sound is not None:
            x = self.put_before(x, sound, self.sound_proj)             # (B, M + Q, C)
        if c.use_vision and vision is not None:
            x = self.put_before(x, vision, self.vision_proj)           # (B, S, C)
        real = F.pad(real, (x.size(1) - real.size(1), 0), value=True)  # (B, S): questions are padded
        mask = hide(~real[:, None, None, :], x.dtype)                  # (B, 1, 1, S): nobody looks at padding
        positions = torch.arange(x.size(1), device=x.device)           # padding is on the right
        own_mask = mask
        if not c.prefix_lm:
            own_mask = mask + hide(positions[:, None] < positions, x.dtype)    # (B, 1, S, S)
        rope = rotations(positions[None], c.head_size, self.rope_freqs)

        h = self.embedded(x)                                           # (B, S, C)
        layers = []
        for block in self.blocks[:-1]:
            h, kept = block(h, rope, own_mask)                         # (B, S, C)
            layers.append(kept)
        # nobody reads what the last block would make of x, only its keys and values
        layers.append(self.blocks[-1].keys_values(h, rope))            # (B, kv, S, hs) both
        return Context(layers, mask, real.sum(1))

    def put_before(self, x, tokens, proj):
        """x behind the tokens of an encoder. Shapes: (B, T, C), (B, N, D) -> (B, N + T, C)"""
        return torch.cat([proj(tokens.type_as(x)), x], dim=1)          # (B, N + T, C)

    def answer_states(self, context, answer, cache=None, inner_steps=None):
        """The recursion. Runs F again and again over the states of answer positions.

        The states of position t see all of x and the states of positions up to t: y and z of each with
        'concat', the one sum that goes through F with 'add'. So the mask goes by position, not by place.
        Shapes: answer (B, A); with a `cache` (B, 1), the position after those in it -> y (B, A, C) at the end
            of each supervised cycle, a list; the last ones answer, all are trained on
        Source: 'add' is the form of Jolicoeur-Martineau 2025, arXiv 2510.04871, made causal.
        """
        c = self.config
        A = answer.size(1)
        cache = NoCache() if cache is None else cache
        e = self.written(answer, context, cache)                       # (B, A, C)
        rope, mask = self.rope_and_mask(context, A, cache, c.streams)
        network = partial(self.network, rope=rope, mask=mask, context=context, cache=cache)    # one pass
        if c.checkpoint_recursion and torch.is_grad_enabled():
            network = partial(checkpoint, network, use_reentrant=False, preserve_rng_state=False)

        y = norm(self.y_start).expand_as(e) if c.recursion == 'add' else self.first_y(e)   # (B, A, C)
        z = None if c.recursion == 'loop' else norm(self.z_start).expand_as(e)     # (B, A, C)
        supervised = []
        for cycle in range(c.outer_steps):
            # the gradient goes through a whole cycle and not beyond it, so what only the first pass gets,
            # y_start and z_start say, learns in the first cycle alone, and never where that is not trained
            if cycle > 0:
                y = y.detach()
                z = None if z is None else z.detach()
            trained = c.deep_supervision or cycle == c.outer_steps - 1
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                for _ in range(inner_steps or c.inner_steps):
                    if cache.settled():  # all rows rest, of which only Halting knows
                        break
                    if c.recursion == 'concat':
                        both = torch.cat(self.pass_input(y, z, e), dim=1)        # (B, 2 A, C)
                        y, z = network(both).chunk(2, dim=1)           # (B, A, C) both
                    elif c.recursion == 'add':  # e every time: the written tokens come in nowhere else
                        z = network(self.bounded(e + y + z))
                    elif c.recursion == 'loop':
                        y = network(*self.pass_input(y, None, e))
                    else:
                        raise ValueError(f'recursion={c.recursion}: has no branch in answer_states')
                if c.recursion == 'add':  # without e: so F can tell a pass for y from one for z
                    y = network(self.bounded(y + z))
            if trained:
                supervised.append(y)
        cache.end_position(A)
        return supervised

    def rope_and_mask(self, context, A, cache, streams):
        """Where the states of A answer positions stand, and what they see of the context, of earlier states
        and of each other: y_t and z_t are both at time t, they see each other, and neither sees t + 1.

        Shapes: -> two (B, 1, T, hs), and a mask (B, 1, T, S + P + T)
        """
        c = self.config
        time = torch.arange(A, device=context.length.device).repeat(streams)   # (T,): of y, then of z again
        hidden = cache.hide_empty(self.unseen(time, cache.room, streams))      # (T, P + T)
        of_context = context.mask.expand(-1, -1, len(time), -1)        # (B, 1, T, S)
        mask = hide(hidden, of_context.dtype).expand(len(of_context), 1, -1, -1)   # (B, 1, T, P + T)
        mask = torch.cat([of_context, mask], dim=-1)                   # (B, 1, T, S + P + T)
        # counted from the last real token of x: the padding of a batch moves no answer
        positions = context.length[:, None] + cache.positions + time   # (B, T)
        return rotations(positions, c.head_size, self.rope_freqs), mask

    def unseen(self, time, room, streams):
        """Which states each one does not see: those of later positions. All earlier ones are seen, of `room`
        positions. Shapes: time (T,) -> bool (T, P + T)"""
        return F.pad(time[:, None] < time, (streams * room, 0))        # (T, P + T)

    def network(self, states, rope, mask, context, cache):
        """F: one pass of the states. Shapes: (B, T, C) -> (B, T, C)."""
        c = self.config
        layers = range(c.n_layer - c.recur_layers, c.n_layer)  # all, unless blocks are pretrained
        states = self.bounded(self.run_blocks(layers, states, rope, mask, context, cache))
        return cache.after_pass(states)  # Halting puts back rows that rest

    def run_blocks(self, layers, states, rope, mask, context, cache):
        """The states through some blocks, given by their numbers; for a cache this is one more pass.
        Shapes: (B, T, C) -> (B, T, C)."""
        past = cache.next_pass(context, layers, states.size(1))
        for i in layers:
            states, kept = self.blocks[i](states, rope, mask, past[i])
            cache.keep(i, kept)
        return states

    def bounded(self, states):
        """Norms what 'pre' blocks get and hand on, so that no number of passes makes it grow; 'post' blocks
        norm it themselves."""
        return norm(states) if self.config.norm == 'pre' else states

    # a PretrainedDecoder has its own way with each of these, with `unseen` and with `put_before`

    def embedded(self, x):
        """Embeddings as the first block wants them: words and image alike at RMS 1, whatever the encoder's
        scale. Shapes: (B, T, C) -> (B, T, C)"""
        return norm(x)

    def written(self, answer, context, cache):
        """e: the tokens of the answer so far, embedded. Shapes: (B, A) -> (B, A, C)"""
        return self.embedded(self.embed(answer))

    def first_y(self, e):
        """y before the first pass. Shapes: (B, A, C) -> (B, A, C)"""
        return e

    def pass_input(self, y, z, e):
        """What goes through F: y + e, or without recall y alone; and z, if there is one.
        Shapes: (B, A, C) each -> a list of one or two"""
        y = norm(y + e) if self.config.recall else y                   # (B, A, C)
        return [y] if z is None else [y, z]

    @torch.no_grad()
    def generate(self, vision, question, max_new_tokens, temperature=0.0, top_k=None, generator=None,
                 cache=None, sound=None, writer=None):
        """Answers token by token, the likeliest at temperature 0, else drawn from the top_k likeliest.

        A token costs one position in each pass: the keys and values of those before it are kept. At
        temperature 0, without Halting, it is the likeliest one of `forward`'s logits, but for rounding.
        cache: empty, a Cache, which is the default, or Halting; writer: a plumbing.graphs.Writer, which has
        caches of its own
        Shapes: as `forward` -> (B, max_new_tokens), every answer up to and with eos_id, pad_id after it
        Raises: ValueError, for Halting where no pass makes all states anew, or beside a writer.
        """
        c = self.config
        B = len(question)
        if isinstance(cache, Halting) and c.recursion not in ('concat', 'loop'):
            raise ValueError(f'Halting: with recursion={c.recursion} a pass does not make all states anew')
        if isinstance(cache, Halting) and c.recur_layers < c.n_layer:
            raise ValueError(f'Halting: with recur_layers={c.recur_layers} no pass goes through all blocks')
        if writer is not None and cache is not None:
            raise ValueError('writer: it has a cache of its own, expected cache=None')
        context = self.read_context(vision, question, sound)
        cache = Cache() if cache is None else cache
        if writer is None:
            next_logits = partial(self.next_logits, context, cache)
        else:
            next_logits = writer.begin(context, max_new_tokens)
        # padding from the start: after an early stop the rest is right
        answer = torch.full((B, max_new_tokens + 1), c.pad_id, device=question.device)
        answer[:, 0] = c.bos_id
        done = torch.zeros(B, dtype=torch.bool, device=question.device)
        cache.done = done  # for Halting; changed in place below
        for t in range(max_new_tokens):
            logits = next_logits(answer[:, t:t + 1])                   # (B, V)
            if temperature == 0:
                token = logits.argmax(-1)                              # (B,)
            else:
                if top_k:
                    least = logits.topk(min(top_k, c.vocab_size)).values[:, -1:]   # (B, 1)
                    logits[logits < least] = -torch.inf
                probabilities = (logits / temperature).softmax(-1)     # (B, V)
                token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]     # (B,)
            # rows that are done go on beside the others: rows never meet
            answer[:, t + 1] = token.masked_fill(done, c.pad_id)
            done |= token == c.eos_id
            if done.all():
                break
        return answer[:, 1:]

    def next_logits(self, context, cache, token):
        """The logits of the token that follows this one. What this one leaves for later ones goes into the
        cache. Shapes: token (B, 1) -> float32 (B, V)"""
        y = self.answer_states(context, token, cache)[-1]              # (B, 1, C)
        return self.head(y)[:, 0].float()                              # (B, V)

    def projections(self):
        """The ways from image and sound tokens into the context, by name, those that there are."""
        return {name: part for name, part in self.named_children() if name in ('vision_proj', 'sound_proj')}

    def parameter_counts(self):
        """Parameters by part; 'core': blocks, start states, gates; a head of its own counts as embedding."""
        total = sum(p.numel() for p in self.parameters())
        embedding = self.embed.weight.numel() * (1 if self.config.tied_head else 2)
        counts = dict(embedding=embedding, vision_proj=0)
        for name, part in self.projections().items():
            counts[name] = sum(p.numel() for p in part.parameters())
        return dict(core=total - sum(counts.values()), **counts, total=total)

    @staticmethod
    def from_pretrained(name, **settings):
        """A decoder with the weights of a language model, see PretrainedDecoder.read. -> PretrainedDecoder"""
        return PretrainedDecoder.read(name, **settings)


# ----------------------------------------------------------------------------
# pretrained language models: the same attention, between blocks of their kind, and recursion through gates

class LlamaBlock(nn.Module):
    """The block of pretrained decoders: learned scales, and a gate on what goes through the MLP.
    Source: Touvron 2023, arXiv 2302.13971; the gate, Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config):
        super().__init__()
        self.checkpoint = config.checkpoint_blocks
        self.norm1 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.fc1 = nn.Linear(config.n_embd, 2 * config.mlp_size, bias=False)   # the gate's half first
        self.fc2 = nn.Linear(config.mlp_size, config.n_embd, bias=False)

    def forward(self, h, rope, mask, past=None):
        """Shapes: as Attention."""
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.run, h, rope, mask, past, use_reentrant=False, preserve_rng_state=False)
        return self.run(h, rope, mask, past)

    def run(self, h, rope, mask, past):
        attended, kept = self.attention(self.norm1(h), rope, mask, past)
        h = h + attended
        gate, through = self.fc1(self.norm2(h)).chunk(2, dim=-1)       # (B, T, mlp_size) both
        return h + self.fc2(F.silu(gate) * through), kept

    def keys_values(self, h, rope):
        """The keys and values that `forward` would make of h alone, (B, kv, T, hs) both."""
        return self.attention.keys_values(self.norm1(h), rope)


class PretrainedDecoder(Decoder):
    """A decoder with norm='rms': blocks as Llama's. Recursion is retrofitted: what a pass made enters the
    next one through gates that start at zero, so that it starts as the language model itself.
    Source: retrofitted recurrence, arXiv 2511.07384; the gates are our own."""

    block = LlamaBlock

    def __init__(self, config):
        super().__init__(config)
        # what such blocks hand on is normed before it is read
        self.head = nn.Sequential(nn.RMSNorm(config.n_embd, config.norm_eps), self.head)
        if config.has_gates:
            self.gates = nn.Parameter(torch.zeros(config.streams, 1, config.n_embd))   # of y, and of z

    def embedded(self, x):
        """Its blocks know words as they are."""
        return x

    def put_before(self, x, tokens, proj):
        """Of the size of words, whatever the encoder's scale."""
        return super().put_before(x, norm(tokens.type_as(x)), proj)

    def written(self, answer, context, cache):
        """e comes out of the first blocks where the last recur_layers alone are passed again."""
        e = self.embed(answer)                                         # (B, A, C)
        first = range(self.config.n_layer - self.config.recur_layers)
        if not first:
            return e
        rope, mask = self.rope_and_mask(context, answer.size(1), cache, streams=1)
        return self.run_blocks(first, e, rope, mask, context, cache)   # (B, A, C)

    def first_y(self, e):
        """Nothing, where gates let it in: no pass has made anything yet."""
        return torch.zeros_like(e) if self.config.has_gates else e

    def unseen(self, time, room, streams):
        """Nor does a y see any z: it gets z through a gate."""
        hidden = super().unseen(time, room, streams)                   # (T, P + T)
        if streams == 2:
            # columns: P earlier states, made one by one, y z y z ...; then all y of now, then all z
            A = len(time) // 2
            hidden[:A, 1:2 * room:2] = True
            hidden[:A, -A:] = True
        return hidden

    def pass_input(self, y, z, e):
        """e, and what the pass before made, as far as gates let it in."""
        if not self.config.has_gates:
            return super().pass_input(y, z, e)
        y = e + self.gates[0] * norm(y)                                # (B, A, C)
        if z is None:
            return [y]
        # z goes on beside it ungated: no y looks there
        return [y + self.gates[1] * norm(z), e + norm(z)]

    @classmethod
    def read(cls, name, **settings):
        """A decoder with the weights of a language model of Llama's, SmolLM2's, Qwen2's or Qwen3's kind.

        name: its folder, or its name on the hub; settings: of ModelConfig, use_vision=False say. Sizes are
        its own, whatever they say. Marks are those of its config.json unless given: bos_id is what an answer
        starts with, for train.py the last token of the prompt.
        Raises: ValueError, FileNotFoundError.
        """
        sizes, marks, tensors = read_decoder(name)
        decoder = cls(ModelConfig(**dict(kind='plain') | marks | settings | sizes))
        other = [key for key, own in decoder.state_dict().items()
                 if key in tensors and tensors[key].shape != own.shape]
        if other:
            raise ValueError(f'{name}: config.json has other sizes than the weights ({", ".join(other[:4])})')
        # none of its own is missing, read_decoder sees to that; new: ways from pictures and sounds, gates, z
        decoder.load_state_dict(tensors, strict=False)
        word = decoder.embed.weight.square().mean().sqrt().item()
        for part in decoder.projections().values():  # at the start their tokens have the size of words
            nn.init.normal_(part.weight, std=word * part.in_features ** -.5)
            nn.init.zeros_(part.bias)
        return decoder


# ----------------------------------------------------------------------------
# the door to both

def build_model(config):
    """A decoder with fresh weights, drawn from torch's current seed."""
    return PretrainedDecoder(config) if config.norm == 'rms' else Decoder(config)
