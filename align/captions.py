"""
Captions for stage 1, of a dataset or drawn while it trains, and the pictures that they are of; that of a
sound is its spectrum.

A batch is a dict: `picture`, indices (B,), or `pixels` (B, 3, S, S) where pictures are drawn; `caption`
(B, P, L), P phrases of up to L tokens, padded with -100; `left_out` (B, P, L) bool, the words that the cloze
asks for; `names`, strings for messages. It depends on (seed, split, step) and nothing else.
"""

import random
import re
from functools import lru_cache
from itertools import cycle, islice

import numpy as np
import torch

from data import Tokenizer, padded, read_rows, train_bpe
from eval import rows_to_judge
from plumbing.features import FileTokens
from plumbing.machine import on_device
from plumbing.pictures import as_seen, rgb_picture, squared
from plumbing.sounds import spectrum_picture
from plumbing.tables import check_splits
from prepare.shapes import Config as ShapesConfig
from prepare.shapes import draw_scene, draw_some_scene, locate, picture_file
from prepare.sounds import MOST_TONES, describe_melody, draw_melody, sound_file
from prepare.sounds import Config as SoundsConfig

SENTENCE_END = r'(?<=[.!?])\s+'
DRAWN_PICTURES = 1000  # a split of drawn pictures has no end; so many are judged
MELODIES = 10007       # of a split; no multiple of a batch, so that each time others are told apart


def cloze(phrases, batch_size, rng):
    """Pads phrases and leaves out every other word or so, never padding.

    Shapes: phrases, batch_size * P lists of tokens -> a dict of caption (B, P, L), left_out (B, P, L) bool
    """
    caption = padded(phrases, -100).unflatten(0, (batch_size, -1))           # (B, P, L)
    # a generator of its own: drawing does not touch the random numbers of the training
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    drawn = torch.rand(caption.shape, generator=generator) < .5              # (B, P, L)
    left_out = drawn & (caption >= 0)                                        # (B, P, L)
    if not left_out.any():  # of few short captions: a mean over no word is no number
        left_out = caption >= 0
    return dict(caption=caption, left_out=left_out)


# ----------------------------------------------------------------------------
# of a dataset

class Captions:
    """The captions of a split's pictures, or of its sounds, which `reads` says: `n_phrases` sentences at a
    time, none longer than `most_tokens`: longer ones are cut into several. An epoch shows every picture once,
    but for those that fill no batch.

    Raises: ValueError where pictures have no caption, naming them; when it is `late`, after the training,
        they are left out, unless none has one.
    """

    def __init__(self, rows, tokenizer, n_phrases=4, most_tokens=64, late=False, reads='picture'):
        self.n_phrases = n_phrases
        files = files_of(rows, reads)
        captions = rows.caption if reads == 'picture' else rows.sound_caption
        self.names = files.names
        self.phrases = []   # of every picture, a list of arrays of tokens
        self.usable = []    # the pictures that have some
        bad = []
        for i, caption in enumerate(captions):
            self.phrases.append(phrases_of(caption or '', tokenizer, most_tokens))
            if self.phrases[i]:
                self.usable.append(i)
            else:
                bad.append(self.names[i])
        if bad:
            problem = (f'{rows.path}: {len(bad)} of {len(captions)} {reads}s have no caption, '
                       f'which captions=dataset needs: {", ".join(bad[:3])}')
            if not late or not self.usable:
                raise ValueError(f'{problem}; give them one, or leave out their rows')
            print(f'{problem}; they are left out')
        # sums of their files: an order that is not that of the rows
        self.usable.sort(key=files.digests.__getitem__)

    def __len__(self):
        return len(self.usable)

    def batch(self, step, batch_size, seed):
        """Shapes: -> a batch with `picture` (B,), see the top of the page.
        Raises: ValueError where there are fewer pictures than a batch has."""
        n = len(self)
        if batch_size > n:
            raise ValueError(f'batch_size={batch_size}: more than the {n} pictures of the split')
        epoch, k = divmod(step, n // batch_size)
        order = np.random.default_rng([seed, epoch]).permutation(n)
        picture = order[k * batch_size:(k + 1) * batch_size]                 # (B,)
        rng = random.Random(f'captions/{seed}/{step}')
        phrases = []
        for i in picture:
            phrases += self.some(i, rng)
        names = [self.names[i] for i in picture[:8]]
        return dict(picture=torch.from_numpy(picture), names=names, **cloze(phrases, batch_size, rng))

    def judged(self, places):
        """The pictures at some places of an order that is not that of the rows; of equal captions the same
        sentences. Shapes: places (B,) -> a batch with `picture` (B,), see the top of the page."""
        picture = [self.usable[place] for place in places]
        phrases = []
        for i in picture:
            content = b''.join(tokens.tobytes() for tokens in self.phrases[i])
            phrases += self.some(i, random.Random(content))
        gaps = random.Random(f'judged/{places[0]}')
        return dict(picture=torch.tensor(picture), **cloze(phrases, len(picture), gaps))

    def some(self, i, rng):
        """`n_phrases` sentences of a picture, lists of tokens; where its caption is short they come again:
        all pictures have the same P."""
        own = self.phrases[i]
        sentences = rng.sample(own, min(self.n_phrases, len(own)))
        return [tokens.tolist() for tokens in islice(cycle(sentences), self.n_phrases)]


def files_of(rows, reads):
    """The pictures of a split, or its sounds."""
    return rows.pictures if reads == 'picture' else rows.sounds


def phrases_of(caption, tokenizer, most_tokens):
    """The sentences of a caption, a list of arrays of tokens, none where it is empty; int32, as all of a
    split stay in memory."""
    phrases = []
    for sentence in re.split(SENTENCE_END, caption.strip()):
        tokens = tokenizer.encode(sentence)
        for start in range(0, len(tokens), most_tokens):
            phrases.append(np.array(tokens[start:start + most_tokens], np.int32))
    return phrases


# ----------------------------------------------------------------------------
# drawn

class DrawnCaptions:
    """Pictures of shapes with captions, drawn when they are asked for: no picture comes twice."""

    def __init__(self, config, tokenizer=None):
        self.config = config
        self.tokenizer = tokenizer  # for `batch`; may come later, trained on a `sample`

    def some_scene(self, rng):
        return draw_scene(rng, self.config)

    def sample(self, n=3000):
        """Phrases as `batch` draws them, for the tokenizer."""
        for i in range(n):
            rng = random.Random(f'tokenizer/{self.config.seed}/{i}')
            yield from self.phrases(self.some_scene(rng), rng)

    def scenes(self, split, step, batch_size, seed):
        """-> scenes, a list of B; their pixels; and the random.Random that drew them.

        Shapes: pixels (B, 3, S, S) uint8
        """
        rng = random.Random(f'align/{seed}/{split}/{step}')
        # varied ones among them, in every split
        drawn = [draw_some_scene(rng, self.config, 'train') for _ in range(batch_size)]
        pictures = []
        for scene, varied in drawn:
            # a file, not the drawing: JPEG leaves its traces, and varied pictures have any size
            pictures.append(self.square(rgb_picture(picture_file(scene, varied, rng, self.config))))
        return [scene for scene, _ in drawn], stacked(pictures), rng

    def square(self, picture):
        """Shapes: an RGB picture, Pillow's of any size -> (S, S, 3) uint8, NumPy's"""
        return np.array(squared(picture, self.config.image_px, 'squash', border=None))

    def phrases(self, scene, rng):
        """What is said about a scene: strings, of every scene as many."""
        return locate(scene, rng, self.config.image_px)

    def batch(self, split, step, batch_size, seed):
        """Shapes: -> a batch with `pixels` (B, 3, S, S) uint8, see the top of the page."""
        scenes, pixels, rng = self.scenes(split, step, batch_size, seed)
        phrases = []
        for scene in scenes:
            for phrase in self.phrases(scene, rng):
                phrases.append(self.tokenizer.encode(phrase))
        return dict(pixels=pixels, names=[f'step {step}'], **cloze(phrases, batch_size, rng))


def stacked(pictures):
    """Shapes: B arrays (S, S, 3) -> (B, 3, S, S)"""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)          # (B, 3, S, S)


class DrawnSounds(DrawnCaptions):
    """The same of melodies: a scene is a list of tones, and its picture a spectrum. They come again, each
    time with other phrases: drawing one takes longer than learning from it."""

    def some_scene(self, rng):
        return draw_melody(rng, rng.randint(1, MOST_TONES))

    def scenes(self, split, step, batch_size, seed):
        numbers = [(step * batch_size + i) % MELODIES for i in range(batch_size)]
        drawn = [self.melody(f'align/{seed}/{split}/melody {k}') for k in numbers]
        melodies, pixels = zip(*drawn)
        return melodies, stacked(pixels), random.Random(f'align/{seed}/{split}/{step}')

    @lru_cache(maxsize=2 * MELODIES)  # room for the other splits
    def melody(self, seed):
        """-> a melody, and the pixels of its spectrum. Shapes: -> (S, S, 3) uint8"""
        rng = random.Random(seed)
        melody = self.some_scene(rng)
        return melody, self.square(as_seen(spectrum_picture(sound_file(melody, rng))))

    def phrases(self, scene, rng):
        return describe_melody(scene, rng)


# ----------------------------------------------------------------------------
# either

class AlignData:
    """What a run learns from: the captions of its splits as tokens, and its pictures.

    `rows_sum`: of a dataset, {split: sha256 of its rows}, by which a run that goes on knows it again.
    """

    def __init__(self, s, saved, splits=('train', 'val')):
        self.settings = s
        self.rows_sum = None
        self.drawn = None   # DrawnCaptions, DrawnSounds, or None: there is a dataset; of that, by split:
        self.rows = {}
        self.captions = {}  # Captions
        self.images = {}    # image tokens, see plumbing.features
        if s.captions == 'drawn' and s.reads == 'picture':
            self.drawn = DrawnCaptions(ShapesConfig(image_px=s.image_px, max_objects=s.max_objects,
                                                    variety=s.variety, seed=s.seed))
            texts = self.drawn.sample()
        elif s.captions == 'drawn':
            self.drawn = DrawnSounds(SoundsConfig(image_px=s.image_px, seed=s.seed))
            texts = self.drawn.sample()
        elif s.captions == 'dataset':
            if splits:  # who only judges needs no more than what is judged
                check_splits(s.dataset)
                self.rows = {split: read_rows(s.dataset, split) for split in splits}
                self.rows_sum = {split: rows.sum.hexdigest() for split, rows in self.rows.items()}
                texts = self.rows['train'].captions
        else:
            raise ValueError(f'captions={s.captions}: expected drawn or dataset')
        # words are learnt once: the weights of a saved run belong to the tokens that it has
        self.tokenizer = Tokenizer(saved['tokenizer'] if saved else train_bpe(texts, s.vocab_size))
        if self.drawn:
            self.drawn.tokenizer = self.tokenizer
        for split, rows in self.rows.items():  # before a picture is encoded: what is missing is said early
            self.captions[split] = Captions(rows, self.tokenizer, reads=s.reads)

    def fitting(self, batch_size, world):
        """The batch size, or that of the training split where it is smaller. Raises: ValueError where the
        processes, `world` of them, cannot share it equally."""
        if not self.drawn:
            n = len(self.captions['train'])
            if n < 2:
                raise ValueError(f'{self.settings.dataset}: {n or "no"} {self.settings.reads} to train on: '
                                 f'captions tell them apart, give two or more')
            if n < batch_size:
                print(f'batch_size={batch_size}: the {n} {self.settings.reads}s of the training split make '
                      'one batch')
                batch_size = n
        if batch_size % world:
            even = batch_size - batch_size % world
            remedy = f'--batch_size={even}' if even else 'fewer processes'
            raise ValueError(f'batch_size={batch_size}: {world} processes contrast as many captions each: '
                             f'expected a multiple of {world}; {remedy} will do')
        return batch_size

    def open_pictures(self, trunk, encoder, device):
        """Makes the splits of the dataset ready. `trunk`: the frozen one, or None where `encoder` learns."""
        self.trunk = trunk
        self.encoder = encoder
        self.device = device
        for split in self.rows:
            self.open(split)

    def open(self, split):
        """What a frozen trunk makes of the pictures of a split is computed here, once, and cached."""
        s = self.settings
        files = files_of(self.rows[split], s.reads)
        self.images[split] = FileTokens(self.trunk or self.encoder, files, self.device, s.cache_dir, s.cache,
                                        trained=self.trunk is None)

    def n_pictures(self, split):
        """How many pictures there are to judge; opens the split where it is not open yet."""
        if self.drawn:
            return DRAWN_PICTURES
        if split not in self.captions:
            self.rows[split] = rows_to_judge(self.settings.dataset, split)
            self.captions[split] = Captions(self.rows[split], self.tokenizer, late=True,
                                            reads=self.settings.reads)
            self.open(split)
        return len(self.captions[split])

    def batch(self, split, step, batch_size, seed):
        """See the top of the page."""
        if self.drawn:
            return self.drawn.batch(split, step, batch_size, seed)
        return self.captions[split].batch(step, batch_size, seed)

    def judged(self, split, k, places, seed):
        """The k-th batch of those that a split is judged on: the pictures at its places. See the top of the
        page."""
        if self.drawn:
            return self.drawn.batch(split, k, len(places), seed)
        return self.captions[split].judged(places)

    def tokens(self, encoder, batch, split):
        """What the encoder makes of the pictures of a batch. Shapes: -> (B, N, D)"""
        return self.encode(encoder, on_device(self.fetch(batch, split), self.device), split)

    def fetch(self, batch, split='train'):
        """A batch with what the device needs of its files in place of their numbers."""
        if self.drawn:
            return batch
        return batch | dict(picture=self.images[split].fetch(batch['picture'].cpu()))

    def encode(self, encoder, fetched, split):
        """As `tokens`, of a batch that is fetched, and on the device."""
        if self.drawn:
            return encoder(encoder.normalise(fetched['pixels']))
        if self.trunk is None:
            return self.images[split].encode(encoder, fetched['picture'])
        patches = self.images[split].encode(self.trunk, fetched['picture'])  # (B, patches, W)
        return encoder.resample(patches)
