"""Whether a picture or a question is unlike those that a run was trained on: then its answer means little."""

import re
from collections import Counter

import torch

MOST_PICTURES = 512   # that say what pictures are like
MOST_WORDS = 50_000   # that are kept, the commonest
FAR = 1.1             # a picture is unlike them that is so many times as far out as the farthest of them


def words_of(question):
    return re.findall(r'\w+', question.lower())


@torch.no_grad()
def what_was_seen(rows, image_tokens):
    """What a checkpoint keeps of its training split: the words of the questions, and mean and spread of the
    image tokens of some pictures.

    image_tokens: indices (B,) -> (B, N, D), or None: the blind control, or an encoder that will change
    """
    counts = Counter(word for question in set(rows.question) for word in words_of(question))
    seen = dict(words=[word for word, _ in counts.most_common(MOST_WORDS)])
    if image_tokens is not None:
        n = len(rows.pictures)
        chosen = torch.linspace(0, n - 1, min(MOST_PICTURES, n)).long()
        summaries = [image_tokens(part).float().mean(1) for part in chosen.split(32)]    # (B, D) each
        summary = torch.cat(summaries).cpu()                                           # (pictures, D)
        seen |= dict(mean=summary.mean(0), spread=summary.std(0, unbiased=False) + 1e-6)   # (D,) both
        seen['farthest'] = max(distance(one, seen) for one in summary)
    return seen


def distance(summary, seen):
    """How many spreads a picture's mean token is from the mean of all, RMS. Shapes: (D,) -> a float."""
    return ((summary - seen['mean']) / seen['spread']).square().mean().sqrt().item()


def warnings(seen, question, vision):
    """What to say of a question and its image tokens, a list. Shapes: vision (1, N, D) or None."""
    said = []
    known = set(seen.get('words', ()))
    new = [word for word in words_of(question) if word not in known and not word.isdecimal()]
    if known and new:
        said.append(f'no training question has the word {", ".join(new[:5])}')
    if vision is not None and 'mean' in seen:
        far = distance(vision[0].float().mean(0).cpu(), seen)
        if far > FAR * seen['farthest']:
            said.append(f'the picture is unlike those of training ({far:.1f} spreads from their mean, '
                        f'the farthest of them {seen["farthest"]:.1f})')
    return said
