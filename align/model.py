"""
Stage 1: the encoder beside a small text tower, trained by captions.

What is trained ends in two losses; after training the encoder alone is kept. B pictures of N tokens, with P
phrases each, of up to L tokens; D dimensions of an image token, W of the text tower.
"""

import math
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F

from encoder import (
    SOUND_CONFIG,
    Block,
    EncoderConfig,
    Reader,
    build_encoder,
    check_reads,
    load_encoder,
    open_encoder,
)
from plumbing.ranks import gathered
from plumbing.run import source_of

MOST_SCALE = 100  # of the similarities, as in CLIP: a larger one makes the contrast unstable


class AlignModel(nn.Module):
    """The encoder beside a small text tower, trained by two losses on captions with words left out.

    Contrast: the mean image token and the mean word agree, at every Matryoshka prefix (symmetric InfoNCE,
    learned temperature). Cloze: the phrase reads the image tokens and fills in the words that were left out,
    which makes the tokens carry what contrast alone does not ask for, above all each object's place.
    Source: CLIP (Radford 2021), MRL (Kusupati 2022); the cloze is BERT's (Devlin 2019) with a picture to look
        at.
    """

    def __init__(self, encoder, vocab_size, width=128, n_layer=1, max_tokens=64):
        super().__init__()
        n_head = max(4, width // 64)
        if width % n_head:
            raise ValueError(f'text_width={width}: expected a multiple of {n_head}, the number of its heads')
        D = encoder.config.vision_dim
        self.encoder = encoder
        # words
        self.embed = nn.Embedding(vocab_size + 1, width)  # the last one stands for a word left out
        self.positions = nn.Parameter(torch.randn(max_tokens, width))
        self.text = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        # for the contrast
        self.text_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, D)
        # for the cloze
        self.vision_projection = nn.Linear(D, width)
        self.reader = Reader(width, n_head)
        self.cloze_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)
        # its exponential is the inverse temperature of the contrast: 10 at the start
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, tokens, caption, left_out):
        """Both losses of a batch.

        Shapes: tokens (B, N, D), the encoder's; caption (B, P, L), padded with -100; left_out (B, P, L) bool,
            words alone -> a dict of scalars
        Units: nats.
        """
        # the contrast gets the same gaps: one pass of the text tower serves both losses
        gapped = caption.masked_fill(left_out, self.embed.num_embeddings - 1)
        words, embedding = self.read_text(gapped)                            # (B, P * L, W), (B, D)
        contrast = self.contrast(tokens.mean(1), embedding)
        filled = self.reader(words, self.vision_projection(tokens))          # (B, P * L, W)
        filled = self.cloze_norm(filled)
        wanted = left_out.flatten(1)                                         # (B, P * L)
        # the head is large: it is asked for the words that were left out, and for no others
        logits = self.head(filled[wanted])                                   # (n left out, vocab_size)
        cloze = F.cross_entropy(logits, caption.flatten(1)[wanted])
        return dict(contrast=contrast, cloze=cloze)

    def read_text(self, caption):
        """Words see their own phrase; the embedding is the mean of the words of all phrases.

        Shapes: caption (B, P, L), padded with -100 -> states of the words (B, P * L, W), embedding (B, D)
        """
        B, P, L = caption.shape
        is_word = (caption >= 0).view(B * P, L)
        h = self.embed(caption.clamp(min=0))                                 # (B, P, L, W)
        h = h.view(B * P, L, -1) + self.positions[:L]                        # (B * P, L, W)
        for block in self.text:
            h = block(h, is_word)
        words = self.text_norm(h) * is_word[..., None]                       # padding counts for nothing
        total = words.view(B, P * L, -1).sum(1)                              # (B, W)
        n_words = is_word.view(B, -1).sum(1, keepdim=True)                   # (B, 1)
        return h.reshape(B, P * L, -1), self.text_projection(total / n_words)

    def contrast(self, pooled, text):
        """Symmetric InfoNCE among the pairs of all processes, mean over the prefixes.

        Shapes: two (B, D) -> a scalar, ln B at chance
        """
        prefixes = self.encoder.config.prefixes
        # float32: similarities near 1, times 100, are too close to each other for half precision
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = gathered(pooled)
            text = gathered(text)
            scale = self.log_scale.exp().clamp(max=MOST_SCALE)
            labels = torch.arange(len(text), device=text.device)             # the right one has its own row
            loss = 0
            for d in prefixes:
                pictures = F.normalize(pooled[:, :d].float(), dim=1)
                captions = F.normalize(text[:, :d].float(), dim=1)
                sims = scale * pictures @ captions.T                         # (B, B)
                both_ways = F.cross_entropy(sims, labels) + F.cross_entropy(sims.T, labels)
                loss = loss + both_ways / 2
            return loss / len(prefixes)


def chosen(s, losses):
    """Those of the losses that are trained on."""
    return {name: loss for name, loss in losses.items() if s.objective in (name, 'both')}


def open_trunk(s, saved, device):
    """The pretrained encoder whose trunk is taken over, frozen; None where the settings name none. `saved`:
    the checkpoint of the run, or None.

    Raises: ValueError where it is more than a trunk; what follows it is to be trained here.
    """
    if not s.trunk:
        return None
    trunk = open_encoder(source_of(s.trunk, saved, 'trunk'), asdict(s), s.reads, pool=s.pool).to(device)
    if trunk.config.n_latents or trunk.config.projection != 'none':
        raise ValueError(f'trunk={s.trunk}: an encoder with a resampler or a projection; expected CLIP '
                         'alone, a network of timm, or Whisper')
    return trunk


def start_from(path, encoder):
    """Gives the encoder the weights of a file. Raises: ValueError where its sizes are others."""
    other = check_reads(load_encoder(path), path, encoder.config.reads)
    sizes = []
    for e in (other, encoder):
        shapes = {name: tuple(p.shape) for name, p in e.state_dict().items()}
        sizes.append((shapes, e.config.n_head, e.config.inner_heads, e.config.image_px))
    if sizes[0] != sizes[1]:
        raise ValueError(f'init_from={path}: an encoder of other sizes than these settings ask for')
    encoder.load_state_dict(other.state_dict())
    print(f'starting from {path}, fingerprint {other.fingerprint()}')


def encoder_config(s, trunk):
    """The EncoderConfig that the settings ask for, with the trunk's part taken over where there is one."""
    if trunk:
        config = asdict(trunk.config)
    else:
        config = dict(image_px=s.image_px, width=s.encoder_width, n_layer=s.encoder_layers)
        for key in ('fit', 'upright', 'activation'):
            if getattr(s, key) is not None:  # else as EncoderConfig has it
                config[key] = getattr(s, key)
    if s.reads == 'sound' and not trunk:
        config |= dict(reads=SOUND_CONFIG.reads, mean=SOUND_CONFIG.mean)
    D = s.encoder_dim
    prefixes = [D // 8, D // 4, D // 2, D]
    if s.prefixes:
        prefixes = [int(d) for d in s.prefixes.split(',')]
    config |= dict(pool=s.pool, adapter=s.adapter, n_latents=s.n_latents, perceiver_layers=s.perceiver_layers,
                   perceiver_width=s.perceiver_width, perceiver_heads=s.perceiver_heads, projection='linear',
                   vision_dim=D, prefixes=tuple(sorted(prefixes)))
    return EncoderConfig(**config)


def build(s, vocab_size, trunk):
    """The model that the settings ask for. With a frozen trunk it has none of its own: what the trunk makes
    of the pictures is computed once, before training."""
    encoder = build_encoder(encoder_config(s, trunk))
    model = AlignModel(encoder, vocab_size, s.text_width, s.text_layers)
    if trunk:
        model.encoder.trunk = nn.Identity()
    return model
