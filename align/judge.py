"""
What an aligned encoder is worth: retrieval, and what a probe reads from its tokens.

    python -m align.judge --out_dir=out/align --split=test    # reports on a finished run again
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from align.captions import AlignData
from align.config import AlignConfig
from align.model import build, chosen, open_trunk
from configurator import configure
from encoder import Reader
from plumbing.console import run_script, say_if_few, table
from plumbing.machine import on_device, pick_device
from plumbing.ranks import by_first, shared
from plumbing.run import read_checkpoint
from prepare.shapes import COLORS, SHAPES
from prepare.sounds import INSTRUMENTS, LENGTHS, PITCHES

AT_ONCE = 250    # pictures whose captions are told apart by the loss
ROUNDING = 2e-6  # of a similarity: two that are closer to each other are equal


# ----------------------------------------------------------------------------
# retrieval

@torch.no_grad()
def retrieval(pooled, text, prefixes, captions=None):
    """Finds each caption's picture among all, and each picture's caption. `captions`: what they say, n values
    to compare; where some are equal, each of their pictures is a right one. None: all differ.

    Shapes: pooled and text (n, D) -> {prefix: {'R@1', 'R@5', 'R@10', 'median rank'}}, over both directions;
        the best rank is 1.
    """
    captions = captions or range(len(text))
    numbers = {caption: i for i, caption in enumerate(captions)}
    number = torch.tensor([numbers[caption] for caption in captions], device=text.device)  # (n,)
    same = number[:, None] == number                                         # (n, n)
    results = {}
    for d in prefixes:
        pictures = F.normalize(pooled[:, :d], dim=1)
        phrases = F.normalize(text[:, :d], dim=1)
        sims = pictures @ phrases.T                                          # (n, n)
        rank = torch.cat([rank_of_right(sims, same), rank_of_right(sims.T, same)])  # (2 n,)
        result = {f'R@{k}': (rank <= k).float().mean().item() for k in (1, 5, 10)}
        result['median rank'] = rank.float().median().item()
        results[d] = result
    return results


def rank_of_right(sims, same):
    """The rank of the nearest right one in every row. Shapes: sims (n, n), same (n, n) bool, the right ones
    -> (n,)"""
    right = sims.masked_fill(~same, -torch.inf).amax(1, keepdim=True)        # (n, 1)
    # what is as near as the right one counts as nearer: embeddings that are all alike, or nan, find nothing;
    # rounding, which is another one on other threads, does not decide
    farther = sims < right - ROUNDING
    rank = 1 + (~farther & ~same).sum(1)                                     # (n,)
    return rank.masked_fill(right.isnan()[:, 0], len(sims))


@torch.no_grad()
def validate(model, data, s, device, split, most=1000):
    """Loss, and retrieval among up to `most` pictures. -> {'loss', 'R@1'}"""
    scores, _, _ = judged(model, data, s, device, split, most)
    return scores


@torch.no_grad()
def judged(model, data, s, device, split, most):
    """Processes share the work. -> loss and R@1, a dict; retrieval at every prefix; and the captions of the
    pictures that it is among."""
    n = min(most, data.n_pictures(split))
    shares = np.array_split(np.arange(n), math.ceil(n / AT_ONCE))
    shown = 'pixels' if data.drawn else 'picture'

    def judge(k):
        batch = on_device(data.judged(split, k, shares[k], s.seed), device)
        # no more at a time than in training: what fits into the memory there fits here
        parts = batch[shown].split(s.batch_size)
        tokens = torch.cat([data.tokens(model.encoder, {shown: part}, split) for part in parts])  # (B, N, D)
        losses = chosen(s, model(tokens, batch['caption'], batch['left_out']))
        # the loss is of captions with gaps, as in training; retrieval has the whole ones
        _, embedding = model.read_text(batch['caption'])                     # (B, D)
        pooled = tokens.mean(1)                                              # (B, D)
        loss = sum(losses.values()).item()
        return loss, pooled.float().cpu(), embedding.float().cpu(), what_is_said(batch['caption'])

    losses, pooled, text, said = zip(*shared(judge, len(shares)))
    captions = sum(said, [])
    by_prefix = retrieval(torch.cat(pooled).to(device), torch.cat(text).to(device),
                          model.encoder.config.prefixes, captions)
    loss = sum(len(share) * loss for share, loss in zip(shares, losses)) / n
    scores = {'loss': loss, 'R@1': by_prefix[model.encoder.config.vision_dim]['R@1']}
    return scores, by_prefix, captions


def what_is_said(caption):
    """Something that is equal for captions of the same phrases, whatever their order. Shapes: (B, P, L) -> a
    list of B"""
    said = []
    for phrases in caption:
        words = sorted(tuple(phrase[phrase >= 0].tolist()) for phrase in phrases.cpu())
        said.append(tuple(words))
    return said


# ----------------------------------------------------------------------------
# the probe

PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]


def probe(encoder, drawn, device, n_train=8000, n_test=2000, steps=1000):
    """What can be read from the frozen tokens: a small network per token says which (colour, shape) pairs
    are in the picture, and where.

    -> pair_f1 and exact_scene (share of pictures with every pair right), in 0..1, and place_error_px, the
        mean distance of the places, all on pictures that the probe was not trained on
    Units: places in pixels.
    """
    half = drawn.config.image_px / 2  # places are learnt as -1..1
    train = probe_data(encoder, drawn, device, 'probe-train', n_train)
    test = probe_data(encoder, drawn, device, 'probe-test', n_test)
    # shared, its steps would round otherwise, and it would be another probe
    return by_first(partial(train_probe, train, test, half, steps))


def train_probe(train, test, half, steps):
    """Trains a `Probe` and judges it. `train`, `test`: as `probe_data`; -> as `probe`"""
    tokens, present, place = train
    torch.manual_seed(0)
    net = Probe(tokens, half)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(tokens), (256,))
        wanted = present[rows]                                               # (256, pairs)
        logit, xy = net(tokens[rows])
        loss = F.binary_cross_entropy_with_logits(logit, wanted) * 5
        distance = (xy - place[rows]).abs().sum(-1)                          # (256, pairs)
        loss = loss + (distance * wanted).sum() / wanted.sum() / half
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    tokens, present, place = test
    with torch.no_grad():
        logit, xy = net(tokens)
    found = (logit > 0).float()
    distance = (xy - place).norm(dim=-1)                                     # (n, pairs)
    f1 = 2 * (found * present).sum() / (found.sum() + present.sum())
    exact = (found == present).all(1).float().mean()
    error = (distance * present).sum() / present.sum()
    return dict(pair_f1=f1.item(), exact_scene=exact.item(), place_error_px=error.item())


class Probe(torch.nn.Module):
    """Every token votes for each pair and for its place; the votes are weighed by their certainty."""

    def __init__(self, tokens, half):
        super().__init__()
        self.mean = tokens.mean((0, 1))  # every encoder has its own range; the probe gets them all alike
        self.std = tokens.std((0, 1))
        self.half = half
        self.net = torch.nn.Sequential(torch.nn.Linear(tokens.size(2), 256), torch.nn.GELU(),
                                       torch.nn.Linear(256, 3 * len(PAIRS)))

    def forward(self, tokens):
        """Shapes: tokens (B, N, D) -> logits of the pairs (B, pairs), their places in pixels (B, pairs, 2)"""
        votes = self.net((tokens - self.mean) / self.std)                    # (B, N, 3 * pairs)
        vote, xy = votes.split([len(PAIRS), 2 * len(PAIRS)], dim=-1)
        xy = xy.unflatten(2, (-1, 2))                                        # (B, N, pairs, 2)
        xy = (vote.softmax(1).unsqueeze(-1) * xy).sum(1)                     # (B, pairs, 2)
        # the votes add up, 16 of 0 to ln 16 = 2.8: without the 2 a pair would start as all but certain
        return vote.logsumexp(1) - 2, self.half + self.half * xy


def probe_data(encoder, drawn, device, split, n):
    """Processes share the work. Shapes: -> tokens (n, N, D); which pairs are in each picture (n, pairs), 0 or
    1; their places in pixels (n, pairs, 2)"""

    def part(step):
        scenes, pixels, _ = drawn.scenes(split, step, AT_ONCE, seed=0)
        tokens = encoder.encode_images(encoder.normalise(pixels.to(device)))  # (250, N, D)
        present = torch.zeros(AT_ONCE, len(PAIRS))
        place = torch.zeros(AT_ONCE, len(PAIRS), 2)
        for i, scene in enumerate(scenes):
            for item in scene:
                pair = PAIRS.index((item['color'], item['shape']))
                present[i, pair] = 1
                place[i, pair] = torch.tensor([item['x'], item['y']])
        return tokens.float().cpu(), present, place

    return tuple(map(torch.cat, zip(*shared(part, n // AT_ONCE))))


# ----------------------------------------------------------------------------
# the probe of sounds

NOTES = sum(PITCHES.values(), ())
TONES = list(product(INSTRUMENTS, NOTES, LENGTHS))
PLACES = 5  # first to fourth, and last


def probe_sounds(encoder, drawn, device, n_train=6000, n_test=2000, steps=600):
    """What can be read from the frozen tokens: a layer of attention says what each tone of a melody is.

    -> shares, 0..1, of melodies that the probe was not trained on: number, how often the number of tones is
        right; instrument, pitch (one of six) and length, of a tone by its place; exact_melody, all of it
    """
    train = sound_probe_data(encoder, drawn, device, 'probe-train', n_train)
    test = sound_probe_data(encoder, drawn, device, 'probe-test', n_test)
    return by_first(partial(train_sound_probe, train, test, steps))


def train_sound_probe(train, test, steps):
    """Trains a `SoundProbe` and judges it. `train`, `test`: as `sound_probe_data`; -> as `probe_sounds`"""
    tokens, tone = train
    torch.manual_seed(0)
    net = SoundProbe(tokens)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(tokens), (128,))
        loss = F.cross_entropy(net(tokens[rows]).flatten(0, 1), tone[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    tokens, tone = test
    with torch.no_grad():
        said = torch.cat([net(part).argmax(-1) for part in tokens.split(AT_ONCE)])  # (n, PLACES)
    scores = dict(number=((said > 0) == (tone > 0)).all(1).float().mean().item())
    there = tone > 0
    # TONES are a grid of instruments, pitches and lengths: what a tone has of each
    sizes = len(INSTRUMENTS), len(NOTES), len(LENGTHS)
    of_each = torch.cartesian_prod(*map(torch.arange, sizes))                # (tones, 3)
    of_each = torch.cat([torch.full((1, 3), -1), of_each])                   # (1 + tones, 3)
    right = of_each[said] == of_each[tone]                                   # (n, PLACES, 3)
    for k, key in enumerate(('instrument', 'pitch', 'length')):
        scores[key] = right[..., k][there].float().mean().item()
    return scores | dict(exact_melody=(said == tone).all(1).float().mean().item())


class SoundProbe(torch.nn.Module):
    """A query for each place reads the tokens."""

    def __init__(self, tokens, width=128):
        super().__init__()
        self.mean = tokens.mean((0, 1))
        self.std = tokens.std((0, 1))
        self.queries = torch.nn.Parameter(torch.randn(PLACES, width))
        self.projection = torch.nn.Linear(tokens.size(2), width)
        self.reader = Reader(width, n_head=4)
        self.head = torch.nn.Linear(width, 1 + len(TONES))

    def forward(self, tokens):
        """Shapes: tokens (B, N, D) -> logits (B, PLACES, 1 + tones); the first one says that there is none"""
        tokens = self.projection((tokens - self.mean) / self.std)            # (B, N, W)
        queries = self.queries.expand(len(tokens), -1, -1)                   # (B, PLACES, W)
        return self.head(self.reader(queries, tokens))


def sound_probe_data(encoder, drawn, device, split, n):
    """Processes share the work. Shapes: -> tokens (n, N, D); the tone at each place (n, PLACES), its place in
    TONES and 1, or 0 where there is none"""

    def part(step):
        melodies, pixels, _ = drawn.scenes(split, step, AT_ONCE, seed=0)
        tokens = encoder.encode_images(encoder.normalise(pixels.to(device)))  # (250, N, D)
        tone = torch.zeros(AT_ONCE, PLACES, dtype=torch.long)
        for i, melody in enumerate(melodies):
            for k, note in enumerate(melody):
                tone[i, [k, -1]] = 1 + TONES.index((note['instrument'], note['hertz'], note['length']))
        return tokens.float().cpu(), tone

    return tuple(map(torch.cat, zip(*shared(part, n // AT_ONCE))))


# ----------------------------------------------------------------------------
# the report

def report(model, data, s, device, split, most=5000):
    """Prints retrieval at every prefix and, of drawn pictures, what a probe reads from the tokens. -> both,
    and the loss"""
    scores, by_prefix, captions = judged(model, data, s, device, split, most)
    n = len(captions)
    say_if_few(n, f'{s.reads}s', split)
    print(f'retrieval among {n} {s.reads}s, both ways; {len(set(captions))} different captions')
    columns = ['R@1', 'R@5', 'R@10']
    rows = []
    for d, result in by_prefix.items():
        rows.append([d, *(f'{result[key]:.3f}' for key in columns), f"{result['median rank']:.0f}"])
    print(table(['dimensions', *columns, 'median rank'], rows))
    scores['retrieval'] = by_prefix
    if data.drawn:  # of other pictures nobody knows what is where
        asked = probe_sounds if s.reads == 'sound' else probe
        scores['probe'] = asked(model.encoder, data.drawn, device)
        print('probe | ' + ' | '.join(f'{key} {value:.3f}' for key, value in scores['probe'].items()))
    return scores


@dataclass
class JudgeConfig:
    out_dir: str = 'out/align'  # the run to report on
    split: str = 'test'         # train, val or test
    dataset: str | None = None  # another dataset folder than the one of the run
    trunk: str | None = None    # where the frozen trunk of the run lies now, if it was moved
    device: str = 'auto'        # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')


def main(argv=None):
    asked, _ = configure(JudgeConfig, sys.argv[1:] if argv is None else argv, '-m align.judge')
    device = pick_device(asked.device)
    checkpoint = read_checkpoint(asked.out_dir)
    if checkpoint['stage'] != 'align':
        raise ValueError(f'{asked.out_dir}: a run that answers questions; python eval.py judges it')
    run = checkpoint['settings']
    moved = dict(dataset=asked.dataset or run['dataset'], trunk=asked.trunk or run['trunk'])
    s = AlignConfig(**run | moved | dict(wandb=False))
    data = AlignData(s, checkpoint, splits=())
    trunk = open_trunk(s, checkpoint, device)
    if trunk and trunk.fingerprint() != checkpoint['trunk_fingerprint']:
        raise ValueError(f'trunk={s.trunk}: not the one that the run was trained with; '
                         f'--trunk says where that lies')
    model = build(s, data.tokenizer.vocab_size, trunk)
    model.load_state_dict(checkpoint['run']['best']['model'])
    data.open_pictures(trunk, model.encoder, device)
    report(model.to(device).eval(), data, s, device, asked.split)


if __name__ == '__main__':
    run_script(main)
