"""Captions for stage 1: of a dataset, or drawn while it trains; some words of them are left out."""
import random
import re

import numpy as np
import torch

from data import padded
from prepare.shapes import draw_picture, draw_scene, locate


def cloze(phrases, batch_size, rng):
    """Shapes: phrases, batch_size * P lists of tokens -> caption (B, P, L), padded with -100, left_out (B, P, L), every other word or so, no padding."""
    caption = padded(phrases, -100).unflatten(0, (batch_size, -1))
    drawn = torch.rand(caption.shape, generator=torch.Generator().manual_seed(rng.getrandbits(60))) < .5
    return dict(caption=caption, left_out=drawn & (caption >= 0))


class Captions:
    """The captions of a split's pictures for the alignment, `n_phrases` sentences at a time, none longer than `most_tokens`: longer ones
    are cut into several. A batch depends on (seed, step) and nothing else; an epoch shows every picture once, but for those that fill no batch.
    Raises: ValueError where pictures have no caption, naming them.
    """

    def __init__(self, rows, tokenizer, n_phrases=4, most_tokens=64):
        bad = [name for name, caption in zip(rows.pictures.names, rows.caption) if not (caption and caption.strip())]
        if bad:
            raise ValueError(f'{rows.path}: {len(bad)} of {len(rows.caption)} pictures have no caption, which captions=dataset needs: {", ".join(bad[:3])}')
        self.n_phrases, self.names, self.phrases = n_phrases, rows.pictures.names, []
        for caption in rows.caption:
            tokens = [tokenizer.encode(sentence) for sentence in re.split(r'(?<=[.!?])\s+', caption.strip())]
            self.phrases.append([np.array(t[i:i + most_tokens], np.int32) for t in tokens for i in range(0, len(t), most_tokens)])

    def batch(self, step, batch_size, seed):
        """Shapes: -> picture (B,) to index pictures or features with; caption (B, P, L) and left_out (B, P, L), see `cloze`.
        Raises: ValueError where there are fewer pictures than a batch has."""
        if batch_size > len(self.phrases):
            raise ValueError(f'batch_size={batch_size}: more than the {len(self.phrases)} pictures of the split')
        epoch, k = divmod(step, len(self.phrases) // batch_size)
        picture = np.random.default_rng([seed, epoch]).permutation(len(self.phrases))[k * batch_size:(k + 1) * batch_size]
        rng, phrases = random.Random(f'captions/{seed}/{step}'), []
        for i in picture:
            chosen = rng.sample(self.phrases[i], min(self.n_phrases, len(self.phrases[i])))
            phrases += [list(map(int, p)) for p in (chosen * self.n_phrases)[:self.n_phrases]]
        return dict(picture=torch.from_numpy(picture), names=lambda: [self.names[i] for i in picture[:8]], **cloze(phrases, batch_size, rng))


class DrawnCaptions:
    """Pictures with captions for the alignment, drawn when they are asked for: no picture comes twice."""

    def __init__(self, config, tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def scenes(self, split, step, batch_size, seed):
        """Shapes: -> scenes, a list of B, pixels (B, 3, S, S) uint8, and the random.Random that drew them; a pure function of its arguments."""
        rng = random.Random(f'align/{seed}/{split}/{step}')
        scenes = [draw_scene(rng, self.config) for _ in range(batch_size)]
        pictures = [np.array(draw_picture(scene, rng, self.config.image_px)) for scene in scenes]
        return scenes, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), rng

    def batch(self, split, step, batch_size, seed):
        """Shapes: -> pixels (B, 3, S, S) uint8; caption (B, P, L), P phrases of up to L tokens, padded with -100; left_out
        (B, P, L) bool, every other word or so."""
        scenes, pixels, rng = self.scenes(split, step, batch_size, seed)
        phrases = [self.tokenizer.encode(phrase) for scene in scenes for phrase in locate(scene, rng, self.config.image_px)]
        return dict(pixels=pixels, names=lambda: [f'step {step}'], **cloze(phrases, batch_size, rng))


def caption_sample(config, n=3000):
    """Phrases as the alignment draws them, for its tokenizer."""
    for i in range(n):
        rng = random.Random(f'tokenizer/{config.seed}/{i}')
        yield from locate(draw_scene(rng, config), rng, config.image_px)
