"""
What an aligned encoder is worth: retrieval, and what a probe reads from its tokens.

    python -m align.judge --out_dir=out/align --split=test    # reports on a finished run again
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from align.captions import AlignData
from align.config import AlignConfig
from align.model import build, chosen, open_trunk
from configurator import configure
from plumbing.console import run_script, table
from plumbing.machine import on_device, pick_device
from plumbing.run import read_checkpoint
from prepare.shapes import COLORS, SHAPES

AT_ONCE = 250  # pictures in a forward pass


# ----------------------------------------------------------------------------
# retrieval

@torch.no_grad()
def retrieval(pooled, text, prefixes):
    """Finds each caption's picture among all, and each picture's caption.

    Shapes: pooled and text (n, D) -> {prefix: {'R@1', 'R@5', 'R@10', 'median rank'}}, over both directions;
        the best rank is 1.
    """
    results = {}
    for d in prefixes:
        pictures = F.normalize(pooled[:, :d], dim=1)
        captions = F.normalize(text[:, :d], dim=1)
        sims = pictures @ captions.T                                         # (n, n)
        rank = torch.cat([rank_of_right(sims), rank_of_right(sims.T)])       # (2 n,)
        result = {f'R@{k}': (rank <= k).float().mean().item() for k in (1, 5, 10)}
        result['median rank'] = rank.float().median().item()
        results[d] = result
    return results


def rank_of_right(sims):
    """The rank of the right one, which row i has in column i. Shapes: (n, n) -> (n,)"""
    right = sims.diagonal()[:, None]                                         # (n, 1)
    farther = sims < right
    # what is as near as the right one counts as nearer: embeddings that are all alike, or nan, find nothing
    return (~farther).sum(1)


@torch.no_grad()
def validate(model, data, s, device, split, most=1000):
    """Loss, and retrieval among up to `most` pictures. -> {'loss', 'R@1'}"""
    scores, _, _ = judged(model, data, s, device, split, most)
    return scores


@torch.no_grad()
def judged(model, data, s, device, split, most):
    """-> loss and R@1, a dict; retrieval at every prefix; and among how many pictures."""
    n = min(most, data.n_pictures(split))
    batch_size = min(AT_ONCE, n)
    steps = n // batch_size
    loss = 0
    pooled = []
    text = []
    for step in range(steps):
        batch = on_device(data.batch(split, step, batch_size, s.seed), device)
        tokens = data.tokens(model.encoder, batch, split)                    # (B, N, D)
        losses = chosen(s, model(tokens, batch['caption'], batch['left_out']))
        loss += sum(losses.values()).item() / steps
        # the loss is of captions with gaps, as in training; retrieval has the whole ones
        _, embedding = model.read_text(batch['caption'])                     # (B, D)
        pooled.append(tokens.mean(1).float())                                # (B, D)
        text.append(embedding.float())
    prefixes = model.encoder.config.prefixes
    by_prefix = retrieval(torch.cat(pooled), torch.cat(text), prefixes)
    scores = {'loss': loss, 'R@1': by_prefix[model.encoder.config.vision_dim]['R@1']}
    return scores, by_prefix, steps * batch_size


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
    tokens, present, place = probe_data(encoder, drawn, device, 'probe-train', n_train)
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

    tokens, present, place = probe_data(encoder, drawn, device, 'probe-test', n_test)
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
    """Shapes: -> tokens (n, N, D); which pairs are in each picture (n, pairs), 0 or 1; their places in pixels
    (n, pairs, 2)"""
    tokens = []
    present = torch.zeros(n, len(PAIRS))
    place = torch.zeros(n, len(PAIRS), 2)
    for step in range(n // AT_ONCE):
        scenes, pixels, _ = drawn.scenes(split, step, AT_ONCE, seed=0)
        encoded = encoder.encode_images(encoder.normalise(pixels.to(device)))  # (250, N, D)
        tokens.append(encoded.float().cpu())
        for i, scene in enumerate(scenes, start=step * AT_ONCE):
            for item in scene:
                pair = PAIRS.index((item['color'], item['shape']))
                present[i, pair] = 1
                place[i, pair] = torch.tensor([item['x'], item['y']])
    return torch.cat(tokens), present, place


# ----------------------------------------------------------------------------
# the report

def report(model, data, s, device, split, most=5000):
    """Prints retrieval at every prefix and, of drawn pictures, what a probe reads from the tokens. -> both,
    and the loss"""
    scores, by_prefix, n = judged(model, data, s, device, split, most)
    print(f'retrieval among {n} pictures, both ways')
    columns = ['R@1', 'R@5', 'R@10']
    rows = []
    for d, result in by_prefix.items():
        rows.append([d, *(f'{result[key]:.3f}' for key in columns), f"{result['median rank']:.0f}"])
    print(table(['dimensions', *columns, 'median rank'], rows))
    scores['retrieval'] = by_prefix
    if data.drawn:  # of other pictures nobody knows what is where
        scores['probe'] = probe(model.encoder, data.drawn, device)
        print('probe | ' + ' | '.join(f'{key} {value:.3f}' for key, value in scores['probe'].items()))
    return scores


@dataclass
class JudgeConfig:
    out_dir: str = 'out/align'  # the run to report on
    split: str = 'test'         # train, val or test
    dataset: str | None = None  # another dataset folder than the one of the run
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
    s = AlignConfig(**run | dict(dataset=asked.dataset or run['dataset'], wandb=False))
    data = AlignData(s, checkpoint, splits=())
    trunk = open_trunk(s, device)
    model = build(s, data.tokenizer.vocab_size, trunk)
    model.load_state_dict(checkpoint['run']['best']['model'])
    data.open_pictures(trunk, model.encoder, device)
    report(model.to(device).eval(), data, s, device, asked.split)


if __name__ == '__main__':
    run_script(main)
