"""Stage 1: the encoder beside a small text tower, trained by captions."""

import math
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F

from encoder import Block, EncoderConfig, Reader, open_encoder
from plumbing.ranks import gathered


class AlignModel(nn.Module):
    """The encoder beside a small text tower, trained by two losses on captions of several phrases with words
    left out.

    Contrast: the mean image token and the mean word agree, at every Matryoshka prefix (symmetric InfoNCE,
    learned temperature). Cloze: the phrase reads the image tokens and fills in the words that were left out,
    which makes the tokens carry what contrast alone does not ask for, above all each object's place.
    Source: CLIP (Radford 2021), MRL (Kusupati 2022); the cloze is BERT's (Devlin 2019) with a picture to look
        at.
    """

    def __init__(self, encoder, vocab_size, width=128, n_layer=1, max_tokens=64):
        super().__init__()
        D, n_head = encoder.config.vision_dim, max(4, width // 64)
        if width % n_head:
            raise ValueError(f'text_width={width}: expected a multiple of {n_head}, the number of its heads')
        self.encoder = encoder
        self.embed = nn.Embedding(vocab_size + 1, width)  # the last one stands for a word left out
        self.positions = nn.Parameter(torch.randn(max_tokens, width))
        self.text = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.text_norm, self.text_projection = nn.LayerNorm(width), nn.Linear(width, D)
        self.vision_projection = nn.Linear(D, width)
        self.reader = Reader(width, n_head)
        self.cloze_norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, tokens, caption, left_out):
        """Shapes: tokens (B, N, D), the encoder's; caption (B, P, L), P phrases of up to L tokens, padded
        with -100; left_out (B, P, L) bool, words alone -> losses, a dict of scalars in nats."""
        idx = caption.masked_fill(left_out, self.embed.num_embeddings - 1)
        h, embedding = self.read_text(idx)  # (B, P * L, W), (B, D)
        losses = {'contrast': self.contrast(tokens.mean(1), embedding)}
        h = self.cloze_norm(self.reader(h, self.vision_projection(tokens)))  # (B, P * L, W)
        wanted = left_out.flatten(1)
        losses['cloze'] = F.cross_entropy(self.head(h[wanted]), caption.flatten(1)[wanted])
        return losses

    def read_text(self, caption):
        """Shapes: caption (B, P, L) -> states of the words (B, P * L, W), which see their own phrase, and
        embedding (B, D)."""
        B, P, L = caption.shape
        seen = (caption >= 0).view(B * P, L)
        h = self.embed(caption.clamp(min=0)).view(B * P, L, -1) + self.positions[:L]
        for block in self.text:
            h = block(h, seen)
        words = (self.text_norm(h) * seen[..., None]).view(B, P * L, -1).sum(1) / seen.view(B, -1).sum(
            1, keepdim=True
        )
        return h.reshape(B, P * L, -1), self.text_projection(words)

    def contrast(self, pooled, text):
        """Symmetric InfoNCE among the pairs of all processes, mean over the prefixes, in float32. Shapes: two
        (B, D) -> a scalar, ln B at chance."""
        with torch.autocast(pooled.device.type, enabled=False):
            pooled, text = gathered(pooled), gathered(text)
            scale, labels, loss = (
                self.log_scale.exp().clamp(max=100),
                torch.arange(len(text), device=text.device),
                0,
            )
            for d in self.encoder.config.prefixes:
                sims = (
                    scale
                    * F.normalize(pooled[:, :d].float(), dim=1)
                    @ F.normalize(text[:, :d].float(), dim=1).T
                )
                loss = loss + (F.cross_entropy(sims, labels) + F.cross_entropy(sims.T, labels)) / 2
            return loss / len(self.encoder.config.prefixes)


def open_trunk(s, device):
    """The pretrained encoder whose trunk is taken over, frozen, or None. Raises: ValueError."""
    if not s.trunk:
        return None
    trunk = open_encoder(s.trunk, asdict(s), pool=s.pool).to(device)
    if trunk.config.n_latents or trunk.config.projection != 'none':
        raise ValueError(f'trunk={s.trunk}: an encoder with a resampler or a projection; expected CLIP alone')
    return trunk


def encoder_config(s, trunk):
    """The EncoderConfig that the settings ask for, with the trunk's part taken over where there is one."""
    D = s.encoder_dim
    prefixes = [D // 8, D // 4, D // 2, D]
    if s.prefixes:
        prefixes = [int(d) for d in s.prefixes.split(',')]
    if trunk:
        config = asdict(trunk.config)
    else:
        config = dict(image_px=s.image_px, width=s.encoder_width, n_layer=s.encoder_layers)
        config |= {
            key: getattr(s, key) for key in ('fit', 'upright', 'activation') if getattr(s, key) is not None
        }
    return EncoderConfig(
        **config
        | dict(
            pool=s.pool,
            adapter=s.adapter,
            n_latents=s.n_latents,
            perceiver_layers=s.perceiver_layers,
            perceiver_width=s.perceiver_width,
            perceiver_heads=s.perceiver_heads,
            projection='linear',
            vision_dim=D,
            prefixes=tuple(sorted(prefixes)),
        )
    )
