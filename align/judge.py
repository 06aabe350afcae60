"""What an aligned encoder is worth: retrieval, and what a probe reads from its tokens."""
import torch
import torch.nn.functional as F

from prepare.shapes import COLORS, SHAPES


@torch.no_grad()
def retrieval(pooled, text, prefixes):
    """Finds each caption's picture among all, and each picture's caption. Shapes: pooled and text (n, D)
    -> {prefix: {'R@1', 'R@5', 'R@10', 'median rank'}}, over both directions; the best rank is 1, and what is as near as the right one counts as nearer."""
    results = {}
    for d in prefixes:
        sims = F.normalize(pooled[:, :d], dim=1) @ F.normalize(text[:, :d], dim=1).T
        rank = torch.cat([(~(s < s.diagonal()[:, None])).sum(1) for s in (sims, sims.T)])  # the right one and all that are not farther away
        results[d] = {f'R@{k}': (rank <= k).float().mean().item() for k in (1, 5, 10)} | {'median rank': rank.float().median().item()}
    return results


def probe(encoder, drawn, device, n_train=8000, n_test=2000, steps=1000):
    """What can be read from the frozen tokens: a small network per token says which (colour, shape) pairs are there and where.

    -> pair_f1 and exact_scene (share of pictures with every pair right), in 0..1, and place_error_px, the mean distance in
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
    net = torch.nn.Sequential(torch.nn.Linear(x.size(2), 256), torch.nn.GELU(), torch.nn.Linear(256, 3 * len(pairs)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def read(x):  # every token votes for each pair and for its place; the votes are weighed by their certainty
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
    return dict(pair_f1=(2 * (found * there).sum() / (found.sum() + there.sum())).item(),
                exact_scene=(found == there).all(1).float().mean().item(),
                place_error_px=(((xy - place).norm(dim=-1) * there).sum() / there.sum()).item())


def report_alignment(settings, checkpoint, device):
    """Prints retrieval, and of drawn pictures the probe, of a run of stage align."""
    from train import AlignTask, TrainConfig
    if settings.attention or settings.states or settings.forget or settings.inner_steps or settings.outer_steps:
        raise ValueError(f'{settings.out_dir}: a run of stage align has no recursion to look at')
    run = checkpoint['settings']
    task = AlignTask(TrainConfig(**run | dict(dataset=settings.dataset or run['dataset'], wandb=False)), device, checkpoint, splits=())
    task.model.load_state_dict(checkpoint['run']['best']['model'])
    task.report(task.model.to(device).eval(), settings.split)
