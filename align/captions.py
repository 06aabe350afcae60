"""Captions for stage 1: of a dataset, or drawn while it trains; some words of them are left out."""

import random
import re
from dataclasses import asdict

import numpy as np
import torch

from data import Tokenizer, padded, read_rows, train_bpe
from eval import rows_to_judge
from plumbing.features import vision_source
from plumbing.tables import check_splits
from prepare.shapes import Config as ShapesConfig
from prepare.shapes import draw_picture, draw_scene, locate


def cloze(phrases, batch_size, rng):
    """Shapes: phrases, batch_size * P lists of tokens -> caption (B, P, L), padded with -100, left_out (B, P,
    L), every other word or so, no padding."""
    caption = padded(phrases, -100).unflatten(0, (batch_size, -1))
    drawn = torch.rand(caption.shape, generator=torch.Generator().manual_seed(rng.getrandbits(60))) < 0.5
    return dict(caption=caption, left_out=drawn & (caption >= 0))


class Captions:
    """The captions of a split's pictures for the alignment, `n_phrases` sentences at a time, none longer than
    `most_tokens`: longer ones are cut into several. A batch depends on (seed, step) and nothing else; an
    epoch shows every picture once, but for those that fill no batch.
    Raises: ValueError where pictures have no caption, naming them.
    """

    def __init__(self, rows, tokenizer, n_phrases=4, most_tokens=64):
        bad = [
            name
            for name, caption in zip(rows.pictures.names, rows.caption)
            if not (caption and caption.strip())
        ]
        if bad:
            raise ValueError(
                f'{rows.path}: {len(bad)} of {len(rows.caption)} pictures have no caption, which '
                f'captions=dataset needs: {", ".join(bad[:3])}'
            )
        self.n_phrases, self.names, self.phrases = n_phrases, rows.pictures.names, []
        for caption in rows.caption:
            tokens = [tokenizer.encode(sentence) for sentence in re.split(r'(?<=[.!?])\s+', caption.strip())]
            self.phrases.append(
                [
                    np.array(t[i : i + most_tokens], np.int32)
                    for t in tokens
                    for i in range(0, len(t), most_tokens)
                ]
            )

    def batch(self, step, batch_size, seed):
        """Shapes: -> picture (B,) to index pictures or features with; caption (B, P, L) and left_out (B, P,
        L), see `cloze`.
        Raises: ValueError where there are fewer pictures than a batch has."""
        if batch_size > len(self.phrases):
            raise ValueError(
                f'batch_size={batch_size}: more than the {len(self.phrases)} pictures of the split'
            )
        epoch, k = divmod(step, len(self.phrases) // batch_size)
        picture = np.random.default_rng([seed, epoch]).permutation(len(self.phrases))[
            k * batch_size : (k + 1) * batch_size
        ]
        rng, phrases = random.Random(f'captions/{seed}/{step}'), []
        for i in picture:
            chosen = rng.sample(self.phrases[i], min(self.n_phrases, len(self.phrases[i])))
            phrases += [list(map(int, p)) for p in (chosen * self.n_phrases)[: self.n_phrases]]
        return dict(
            picture=torch.from_numpy(picture),
            names=[self.names[i] for i in picture[:8]],
            **cloze(phrases, batch_size, rng),
        )


class DrawnCaptions:
    """Pictures with captions for the alignment, drawn when they are asked for: no picture comes twice."""

    def __init__(self, config, tokenizer):
        self.config, self.tokenizer = config, tokenizer

    def scenes(self, split, step, batch_size, seed):
        """Shapes: -> scenes, a list of B, pixels (B, 3, S, S) uint8, and the random.Random that drew them; a
        pure function of its arguments."""
        rng = random.Random(f'align/{seed}/{split}/{step}')
        scenes = [draw_scene(rng, self.config) for _ in range(batch_size)]
        pictures = [np.array(draw_picture(scene, rng, self.config.image_px)) for scene in scenes]
        return scenes, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), rng

    def batch(self, split, step, batch_size, seed):
        """Shapes: -> pixels (B, 3, S, S) uint8; caption (B, P, L), P phrases of up to L tokens, padded with
        -100; left_out (B, P, L) bool, every other word or so."""
        scenes, pixels, rng = self.scenes(split, step, batch_size, seed)
        phrases = [
            self.tokenizer.encode(phrase)
            for scene in scenes
            for phrase in locate(scene, rng, self.config.image_px)
        ]
        return dict(pixels=pixels, names=[f'step {step}'], **cloze(phrases, batch_size, rng))


def caption_sample(config, n=3000):
    """Phrases as the alignment draws them, for its tokenizer."""
    for i in range(n):
        rng = random.Random(f'tokenizer/{config.seed}/{i}')
        yield from locate(draw_scene(rng, config), rng, config.image_px)


class AlignData:
    """The captions of every split as tokens, and its pictures: drawn as they are needed, or those of a
    dataset."""

    def __init__(self, s, saved, splits=('train', 'val')):
        self.settings = s
        self.rows_sum = None
        self.images = {}  # split -> its image tokens, for a dataset
        self.captions = {}  # split -> Captions, for a dataset
        self.drawn = None
        if s.captions == 'drawn':
            shapes = ShapesConfig(image_px=s.image_px, max_objects=s.max_objects, seed=s.seed)
            texts = caption_sample(shapes)
            self.rows = {}
        elif s.captions == 'dataset':
            if splits:  # who only evaluates needs no more than what is evaluated
                check_splits(s.dataset)
            self.rows = {split: read_rows(s.dataset, split) for split in splits}
            texts = (caption for caption in self.rows['train'].captions) if not saved else ()
            if splits:
                self.rows_sum = {split: rows.sum.hexdigest() for split, rows in self.rows.items()}
        else:
            raise ValueError(f'captions={s.captions}: expected drawn or dataset')
        self.tokenizer = Tokenizer(saved['tokenizer'] if saved else train_bpe(texts, s.vocab_size))
        if s.captions == 'drawn':
            self.drawn = DrawnCaptions(shapes, self.tokenizer)

    def open_pictures(self, trunk, encoder, device):
        """Makes the splits of the dataset ready: what a frozen trunk makes of their pictures is computed
        once."""
        self.trunk = trunk
        self.encoder = encoder
        self.device = device
        for split in self.rows:
            self.open(split)

    def open(self, split):
        if split not in self.rows:
            self.rows[split] = rows_to_judge(self.settings.dataset, split)
        self.captions[split] = Captions(self.rows[split], self.tokenizer)
        how = asdict(self.settings) | dict(use_vision=True, vision_dim=None, train_encoder=self.trunk is None)
        self.images[split] = vision_source(how, self.trunk or self.encoder, self.rows[split], self.device)

    def n_pictures(self, split):
        if self.drawn:
            return 1000
        if split not in self.captions:
            self.open(split)
        return len(self.rows[split].pictures)

    def batch(self, split, step, batch_size, seed):
        if self.drawn:
            return self.drawn.batch(split, step, batch_size, seed)
        return self.captions[split].batch(step, batch_size, seed)

    def tokens(self, encoder, batch, split):
        """What the encoder makes of the pictures of a batch. -> (B, N, D)"""
        if self.drawn:
            return encoder(encoder.normalise(batch['pixels']))
        if self.trunk is None:
            return self.images[split](encoder, batch['picture'])
        patches = self.images[split](self.trunk, batch['picture'])  # (B, P, W)
        return encoder.resample(patches)
