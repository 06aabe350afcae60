"""What an aligned encoder is worth: retrieval, and what a probe reads from its tokens."""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from align.captions import AlignData
from align.config import AlignConfig
from align.model import AlignModel, encoder_config, open_trunk
from configurator import configure
from encoder import Encoder
from plumbing.console import run_script, table
from plumbing.machine import on_device, pick_device
from plumbing.run import read_checkpoint
from prepare.shapes import COLORS, SHAPES


@torch.no_grad()
def retrieval(pooled, text, prefixes):
    """Finds each caption's picture among all, and each picture's caption. Shapes: pooled and text (n, D)
    -> {prefix: {'R@1', 'R@5', 'R@10', 'median rank'}}, over both directions; the best rank is 1, and what is
        as near as the right one counts as nearer."""
    results = {}
    for d in prefixes:
        sims = F.normalize(pooled[:, :d], dim=1) @ F.normalize(text[:, :d], dim=1).T
        rank = torch.cat(
            [(~(s < s.diagonal()[:, None])).sum(1) for s in (sims, sims.T)]
        )  # the right one and all that are not farther away
        results[d] = {f'R@{k}': (rank <= k).float().mean().item() for k in (1, 5, 10)} | {
            'median rank': rank.float().median().item()
        }
    return results


def probe(encoder, drawn, device, n_train=8000, n_test=2000, steps=1000):
    """What can be read from the frozen tokens: a small network per token says which (colour, shape) pairs are
    there and where.

    -> pair_f1 and exact_scene (share of pictures with every pair right), in 0..1, and place_error_px, the
        mean distance in
    pixels between true and read places, all on pictures that the probe was not trained on.
    """
    pairs = [(c, s) for c in COLORS for s in SHAPES]

    def tokens_and_scenes(split, n):
        tokens, there, place = [], torch.zeros(n, len(pairs)), torch.zeros(n, len(pairs), 2)
        for step in range(n // 250):
            scenes, pixels, _ = drawn.scenes(split, step, 250, seed=0)
            tokens.append(encoder.encode_images(encoder.normalise(pixels.to(device))).float().cpu())
            for i, scene in enumerate(scenes):
                for o in scene:
                    j = pairs.index((o['color'], o['shape']))
                    there[step * 250 + i, j] = 1
                    place[step * 250 + i, j] = torch.tensor([o['x'], o['y']])
        return torch.cat(tokens), there, place

    x, there, place = tokens_and_scenes('probe-train', n_train)
    mean, std = x.mean((0, 1)), x.std((0, 1))
    half = drawn.config.image_px / 2
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(x.size(2), 256), torch.nn.GELU(), torch.nn.Linear(256, 3 * len(pairs))
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def read(
        x,
    ):  # every token votes for each pair and for its place; the votes are weighed by their certainty
        vote, xy = net((x - mean) / std).split([len(pairs), 2 * len(pairs)], dim=-1)
        xy = (vote.softmax(1).unsqueeze(-1) * xy.unflatten(2, (-1, 2))).sum(1)
        return vote.logsumexp(1) - 2, half + half * xy

    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(x), (256,))
        logit, xy = read(x[rows])
        loss = F.binary_cross_entropy_with_logits(logit, there[rows]) * 5
        loss = loss + ((xy - place[rows]).abs().sum(-1) * there[rows]).sum() / there[rows].sum() / half
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, there, place = tokens_and_scenes('probe-test', n_test)
    with torch.no_grad():
        logit, xy = read(x)
    found = (logit > 0).float()
    return dict(
        pair_f1=(2 * (found * there).sum() / (found.sum() + there.sum())).item(),
        exact_scene=(found == there).all(1).float().mean().item(),
        place_error_px=(((xy - place).norm(dim=-1) * there).sum() / there.sum()).item(),
    )


@torch.no_grad()
def validate(model, data, s, device, split, most=1000):
    """Loss, and retrieval among up to `most` pictures."""
    return judged(model, data, s, device, split, most)[0]


@torch.no_grad()
def judged(model, data, s, device, split, most):
    """-> loss and R@1, retrieval at every prefix, and among how many pictures."""
    n = data.n_pictures(split)
    size = min(250, most, n)
    steps = min(most, n) // size
    loss = 0
    pooled = []
    text = []
    for step in range(steps):
        batch = on_device(data.batch(split, step, size, s.seed), device)
        tokens = data.tokens(model.encoder, batch, split)  # (B, N, D)
        losses = model(tokens, batch['caption'], batch['left_out'])
        loss += sum(term for name, term in losses.items() if s.objective in (name, 'both')).item() / steps
        pooled.append(data.tokens(model.encoder, batch, split).mean(1).float())  # (B, D)
        text.append(model.read_text(batch['caption'])[1].float())  # (B, D)
    prefixes = model.encoder.config.prefixes
    found = retrieval(torch.cat(pooled), torch.cat(text), prefixes)
    return {'loss': loss, 'R@1': found[max(prefixes)]['R@1']}, found, steps * size


def report(model, data, s, device, split, most=5000):
    """Prints retrieval at every prefix and, of drawn pictures, what a probe reads from the tokens. -> both,
    and the loss"""
    scores, found, n = judged(model, data, s, device, split, most)
    print(f'retrieval among {n} pictures, both ways')
    rows = [
        [d, *(f'{r[key]:.3f}' for key in ('R@1', 'R@5', 'R@10')), f"{r['median rank']:.0f}"]
        for d, r in found.items()
    ]
    print(table(['dimensions', 'R@1', 'R@5', 'R@10', 'median rank'], rows))
    scores |= dict(retrieval=found)
    if data.drawn:
        scores['probe'] = probe(model.encoder, data.drawn, device)
        print('probe | ' + ' | '.join(f'{key} {value:.3f}' for key, value in scores['probe'].items()))
    return scores


@dataclass
class JudgeConfig:
    out_dir: str = 'out/align'  # the run to report on
    split: str = 'test'  # train, val or test
    dataset: str | None = None  # another dataset folder than the one of the run
    device: str = 'auto'  # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')


def main(argv=None):
    settings, _ = configure(JudgeConfig, sys.argv[1:] if argv is None else argv, '-m align.judge')
    device = pick_device(settings.device)
    checkpoint = read_checkpoint(settings.out_dir)
    if checkpoint['stage'] != 'align':
        raise ValueError(f'{settings.out_dir}: a run that answers questions; python eval.py judges it')
    run = checkpoint['settings']
    s = AlignConfig(**run | dict(dataset=settings.dataset or run['dataset'], wandb=False))
    data = AlignData(s, checkpoint, splits=())
    trunk = open_trunk(s, device)
    model = AlignModel(
        Encoder(encoder_config(s, trunk)), data.tokenizer.vocab_size, s.text_width, s.text_layers
    )
    if trunk:
        model.encoder.trunk = torch.nn.Identity()
    data.open_pictures(trunk, model.encoder, device)
    model.load_state_dict(checkpoint['run']['best']['model'])
    report(model.to(device).eval(), data, s, device, settings.split)


if __name__ == '__main__':
    run_script(main)
