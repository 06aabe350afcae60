"""Whether a picture or a question is unlike those that a run was trained on: then its answer means little."""

import re
from collections import Counter

import torch

MOST_PICTURES = 1024  # that say what pictures are like
MOST_DIMS = 128       # of a token: our encoder puts what matters first
MOST_WORDS = 50_000   # that are kept, the commonest
FAR = 1.1             # a picture so many times as far from their mean as the farthest of them is unlike them


def words_of(question):
    return re.findall(r'\w+', question.lower())


@torch.no_grad()
def what_was_seen(rows, image_tokens):
    """What a checkpoint keeps of its training split: the words of the questions; mean and inverse covariance
    of the mean tokens of some pictures; and how far out the farthest of them is.

    image_tokens: indices (B,) -> (B, N, D), or None: the blind control, or an encoder that will change
    """
    counts = Counter(word for question in set(rows.question) for word in words_of(question))
    seen = dict(words=[word for word, _ in counts.most_common(MOST_WORDS)])
    if image_tokens is not None and len(rows.pictures):
        n = len(rows.pictures)
        chosen = torch.linspace(0, n - 1, min(MOST_PICTURES, n)).long()
        summaries = [image_tokens(part).float().mean(1) for part in chosen.split(32)]    # (B, D) each
        summary = torch.cat(summaries).cpu()[:, :MOST_DIMS]                            # (pictures, D)
        # fitted to half of them, measured on all: what it is fitted to looks nearer than a new picture
        usual = summary[::2]                                                           # (pictures / 2, D)
        away = usual - usual.mean(0)                                                   # (pictures / 2, D)
        covariance = away.T @ away / len(away)                                         # (D, D)
        # so that there is an inverse, even of few pictures
        even = (0.01 * covariance.diagonal().mean() + 1e-6) * torch.eye(len(covariance))
        seen |= dict(mean=usual.mean(0), inverse=torch.linalg.inv(covariance + even))
        seen['farthest'] = max(distance(one, seen) for one in summary)
    return seen


def distance(summary, seen):
    """How far a picture's mean token is from the mean of all: Mahalanobis' distance over the root of D, about
    1 for a usual picture. Shapes: (D,) -> a float."""
    away = summary - seen['mean']                                                      # (D,)
    return (away @ seen['inverse'] @ away / len(away)).sqrt().item()


def doubts(seen, question, vision):
    """What to say of a question and its image tokens, a list. Shapes: vision (1, N, D) or None."""
    said = []
    known = set(seen.get('words', ()))
    new = [word for word in words_of(question) if word not in known and not word.isdecimal()]
    if known and new:
        said.append(f'no training question has the word {", ".join(new[:5])}')
    # blind runs, those that train their encoder and older ones have none
    if vision is not None and 'inverse' in seen:
        far = distance(vision[0].float().mean(0).cpu()[:MOST_DIMS], seen)
        if far > FAR * seen['farthest']:
            said.append(f'the picture is unlike those of training ({far:.1f} spreads from their mean, '
                        f'the farthest of them {seen["farthest"]:.1f})')
    return said
