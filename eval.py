"""
Evaluation: Exact Match, token F1 and token accuracy by question type; retrieval for the encoder; answering; pictures.

    python eval.py --out_dir=out/trm                                          # the test split again, with all its files
    python eval.py --out_dir=out/trm --image=cat.jpg --question="what is it?" # one picture of your own
    python eval.py --out_dir=out/trm --attention=true                         # where every step of the recursion looks
    python eval.py --out_dir=out/trm --states=true                            # how large the states are over 64 steps
    python eval.py --compare=out/trm,out/plain                                # finished runs side by side
"""

import json
import math
import os
import random
import re
import string
import sys
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from glob import glob
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from configurator import configure, locked, pick_device, printable, progress, run_script, write_whole
from data import OnDisk, Questions, Tokenizer, View, picture_sheet, read_rows
from encoder import Encoder, EncoderConfig, PixelReader, cached_features, load_encoder, open_picture, picture_from, pixel_array, safe_load
from model import ModelConfig, build_model, state_sizes, table
from prepare.shapes import COLORS, SHAPES

FORMAT = 4  # of checkpoints; raised when their content changes


@dataclass
class EvalConfig:
    out_dir: str = 'out/trm'        # the run to evaluate
    split: str = 'test'             # train, val or test
    dataset: str | None = None      # another dataset folder than the one of the run
    image: str | None = None        # a picture file: answer `question` about it instead
    question: str | None = None     # the question about `image`
    majority: bool = False          # print what the commonest answer of the training split gets instead; a --dataset needs no run
    question_only: bool = False     # print what the commonest answer to the same question gets instead
    attention: bool = False         # draw where every step of the recursion looks, for a few questions, to out_dir/attention.png instead
    states: bool = False            # print how large the states are over 64 steps instead
    compare: str | None = None      # run folders, or patterns such as out/*, separated by commas: their results side by side instead, and pictures
    types: str | None = None        # with compare: the question types whose mean is judged, separated by commas; None: all
    reach: float | None = None      # with compare: say when validation Exact Match first had this value
    inner_steps: int | None = None  # test-time depth: another number of inner steps than in training
    outer_steps: int | None = None  # the same for the outer steps
    forget: str | None = None       # y or z: set it back to its start before every step; what does it carry from one to the next?
    temperature: float = 0.0        # 0: the likeliest token; above: draw tokens
    top_k: int | None = None        # with a temperature: draw from the k likeliest only
    seed: int = 1337                # of the drawing
    batch_size: int = 256           # rows at a time, fewer where answers have more than 8 tokens
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')
        if self.forget not in (None, 'y', 'z'):
            raise ValueError(f'forget={self.forget}: expected y or z')
        modes = [f'--{key}' for key in ('image', 'majority', 'question_only', 'attention', 'states', 'compare') if getattr(self, key)]
        if len(modes) > 1:
            raise ValueError(f'{" and ".join(modes)}: one at a time')
        if self.forget and modes not in ([], ['--image'], ['--attention']):
            raise ValueError(f'--forget goes with an evaluation, a picture or --attention, not with {modes[0]}')
        if (self.temperature or self.top_k) and modes not in ([], ['--image']):
            raise ValueError(f'--temperature and --top_k go with an evaluation or a picture, not with {modes[0]}')
        if self.top_k and not self.temperature:
            raise ValueError('--top_k goes with a --temperature above 0')
        if (self.image is None) != (self.question is None):
            raise ValueError('--image and --question belong together: both or neither')
        if (self.types or self.reach) and not self.compare:
            raise ValueError('--types and --reach go with --compare')
        for key, least in dict(batch_size=1, temperature=0, top_k=1).items():
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least {least}')


# ----------------------------------------------------------------------------
# metrics

def normalize_answer(text):
    """Lower case, without ASCII punctuation, articles and extra space. Source: SQuAD v2.0, evaluate-v2.0.py."""
    text = ''.join(ch for ch in text.lower() if ch not in string.punctuation)
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def exact_match(prediction, references):
    """1.0 if the prediction equals a reference after normalisation, else 0.0. `references`: a string or a list of strings."""
    return float(normalize_answer(prediction) in gold_answers(references))


def token_f1(prediction, references):
    """Overlap of normalised tokens, the best over the references, in 0..1; two empty answers agree, one empty one does not."""
    def f1(gold):
        a, b = normalize_answer(prediction).split(), gold.split()
        if not a or not b:
            return float(a == b)
        common = sum((Counter(a) & Counter(b)).values())
        precision, recall = common / len(a), common / len(b)
        return 2 * precision * recall / (precision + recall) if common else 0.0  # in the order of SQuAD's script: the same to the last bit
    return max(f1(gold) for gold in gold_answers(references))


def gold_answers(references):
    """The normalised references; those that are empty then do not count, unless all are."""
    references = [references] if isinstance(references, str) else references
    return [gold for r in references if (gold := normalize_answer(r))] or ['']


NUMBERS = {word: str(n) for n, word in enumerate('zero one two three four five six seven eight nine ten'.split())} | {'none': '0'}
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in (  # written with an apostrophe left out -> with all of them
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd "
    "it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't "
    "shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've").split() for i, ch in enumerate(word) if ch == "'"} | {"somebody'd": 'somebodyd'}


def vqa_accuracy(prediction, answers):
    """The official accuracy of VQA v2, in 0..1: the mean over ten people of min(1, a third of how many of the other nine gave this answer).

    Source: GT-Vision-Lab/VQA, vqaEval.py at a013f00, with what it does and does not mean to do: answers are normalised only where people disagree,
    'none' is 0, and a point goes unless a digit follows it (of the first 32).
    """
    def normalised(text):
        digits = re.search(r'\d,\d', text)
        out = text
        for sign in ';/[]"{}()=+\\_-><@`,?!':
            out = out.replace(sign, '' if sign + ' ' in text or ' ' + sign in text or digits else ' ')
        words = [NUMBERS.get(word, word) for word in re.sub(r'\.(?!\d)', '', out, count=32).lower().split()]
        return ' '.join(CONTRACTIONS.get(word, word) for word in words if word not in ('a', 'an', 'the'))

    prediction, *answers = (text.replace('\n', ' ').replace('\t', ' ').strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(normalised, (prediction, *answers))
    same = [answer == prediction for answer in answers]
    return sum(min(1, (sum(same) - s) / 3) for s in same) / len(same)


# ----------------------------------------------------------------------------
# one process of several that work together, started by torchrun

def rank_and_world():
    """-> the number of this process, and how many there are; (0, 1) where it works alone."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


def in_turn(make):
    """Calls make() in the first process, then in the first of every other machine, then in all others, and returns what it returns there:
    what the first one leaves on disk, the others find."""
    rank, world = rank_and_world()
    turn = 0 if rank == 0 else 1 if int(os.environ.get('LOCAL_RANK', 0)) == 0 else 2
    for now in range(3 if world > 1 else 1):
        if now == turn:
            made = make()
        if world > 1:
            torch.distributed.barrier()
    return made


def from_all(item):
    """-> the items of all processes, a list; items are plain Python values."""
    items = [item] * rank_and_world()[1]
    if len(items) > 1:
        torch.distributed.all_gather_object(items, item)
    return items


# ----------------------------------------------------------------------------
# a split, evaluated

def on_device(batch, device):
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def teacher_forced(decoder, batch, vision):
    """Losses and hits of every target of a batch. Shapes: as `Questions.batch`, vision (B, N, D) -> loss (B, A) nats, hit (B, A) bool, real (B, A) bool."""
    logits, _ = decoder(vision, batch['question'], batch['answer'])
    real = batch['targets'] >= 0
    loss = F.cross_entropy(logits.transpose(1, 2).float(), batch['targets'], ignore_index=-100, reduction='none')
    return loss, (logits.argmax(-1) == batch['targets']) & real, real


@torch.no_grad()
def quick_scores(decoder, questions, vision_of, device, most_rows=2000, batch_size=250):
    """Loss and Exact Match of a split without generating: greedy generation gives exactly the (first) reference if and only if
    every one of its tokens is the likeliest after the true ones before it. Captions count for the loss only. Processes share the work.
    `vision_of`: picture indices (B,) -> image tokens (B, N, D)."""
    loss = count = right = n = 0
    rank, world = rank_and_world()
    for rows in islice(questions.rows_in_order(batch_size, most_rows), rank, None, world):
        batch = on_device(questions.batch(rows), device)
        losses, hit, real = teacher_forced(decoder, batch, vision_of(batch['picture']))
        asked = torch.tensor([questions.rows.type[i] != 'describe' for i in rows], device=device)
        loss, count = loss + losses.sum().item(), count + real.sum().item()
        right, n = right + ((hit == real).all(1) & asked).sum().item(), n + asked.sum().item()
    loss, count, right, n = map(sum, zip(*from_all((loss, count, right, n))))
    return {'loss': loss / count, 'em': right / max(n, 1)}


@torch.no_grad()
def evaluate(decoder, questions, vision_of, device, batch_size=256, **sampling):
    """Answers a whole split -> metrics, a dict, and predictions, a sequence of dicts in the order of the split, on disk. Processes share the work.
    `vision_of`: picture indices (B,) -> image tokens (B, N, D).

    'em' and 'f1' are means over the questions; captions ('describe' rows) stand apart under their type, as Exact Match means
    little for them; 'em_types' is the mean over the question types; 'tokens_per_s' counts those written in the seconds of the whole evaluation.
    """
    rows, tokenizer, done, start, tokens, order, mine = questions.rows, questions.tokenizer, 0, time.time(), 0, array('q'), OnDisk()
    rank, world = rank_and_world()
    for indices in islice(questions.rows_in_order(batch_size), rank, None, world):
        batch = on_device(questions.batch(indices), device)
        vision = vision_of(batch['picture'])
        answers = decoder.generate(vision, batch['question'], questions.max_answer_tokens, **sampling).tolist()
        sums = (t.sum(1).tolist() for t in teacher_forced(decoder, batch, vision))  # loss, hits and targets of every row
        for i, answer, nats, hits, n in zip(indices.tolist(), answers, *sums):
            tokens += sum(token != tokenizer.pad_id for token in answer)
            order.append(i)
            mine.append(scored(rows, i, tokenizer.decode(answer)) | dict(loss=nats, hits=hits, tokens=n))
        done = min(done + world * len(indices), len(rows))
        progress('evaluating', done, len(rows), start)
    print()
    everything, at, written = OnDisk(), array('q', [-1]) * len(rows), 0
    for n, order, part in from_all((tokens, order, list(mine) if world > 1 else mine)):
        written += n
        for i, prediction in zip(order, part):
            at[i] = len(everything)
            everything.append(prediction)
    predictions, seconds = View(at.__len__, lambda i: everything[at[i]]), time.time() - start
    return summaries(predictions) | dict(tokens_per_s=written / seconds, eval_s=seconds), predictions


def scored(rows, i, text):
    """A prediction for a row with what it is worth: 'em', 'f1', 'equal' (the very string, as GQA counts) and, of ten answers, 'vqa'."""
    references = rows.references[i]
    return dict(sample_id=rows.sample_id[i], type=rows.type[i], question=rows.question[i], prediction=text, references=references,
                em=exact_match(text, references), f1=token_f1(text, references), equal=float(text in references),
                **({'vqa': vqa_accuracy(text, references)} if len(references) == 10 else {}))


def summaries(predictions):
    """Means over all questions and by type. Captions ('describe') stand apart under their type; 'em_types' is the mean over the others."""
    sums = {}
    for p in predictions:
        for group in (p['type'], None) if p['type'] != 'describe' else (p['type'],):
            sums.setdefault(group, Counter()).update({key: p[key] for key in ('em', 'f1', 'equal', 'vqa', 'tokens', 'hits', 'loss') if key in p} | dict(n=1, ten='vqa' in p))
    by_type = {type: summary(sums[type]) for type in sorted(filter(None, sums), key=type_order)}
    question_types = [t for t in by_type if t != 'describe'] or list(by_type)
    return summary(sums.get(None) or sums['describe']) | dict(em_types=sum(by_type[t]['em'] for t in question_types) / len(question_types), by_type=by_type)


def summary(sums):
    n, tokens = sums['n'], sums['tokens']
    result = dict(n=n, **{key: sums[key] / n for key in ('em', 'f1', 'equal')}, **({'vqa': sums['vqa'] / n} if sums['ten'] == n else {}))
    return result | (dict(token_accuracy=sums['hits'] / tokens, loss=sums['loss'] / tokens) if tokens else {})


def baseline(train, rows, question_only):
    """What can be had without looking: the commonest answer of the training split, or with `question_only` the commonest to the same question,
    else to those that begin with the same two words. -> metrics, as `evaluate`"""
    begin = lambda question: ' '.join(question.lower().split()[:2])
    common = {None: Counter()}
    for question, references in zip(train.question, train.references):
        for key in (None, ('question', question.lower()), ('begin', begin(question))):
            common.setdefault(key, Counter())[references[0]] += 1
    guess = {key: counts.most_common(1)[0][0] for key, counts in common.items()}
    predictions = []
    for i, question in enumerate(rows.question):
        keys = [('question', question.lower()), ('begin', begin(question))] if question_only else []
        predictions.append(scored(rows, i, next((guess[key] for key in keys if key in guess), guess[None])))
    return summaries(predictions)


def type_order(type):
    order = ('color', 'shape', 'exist', 'count', 'compare', 'relation')
    return (order.index(type) if type in order else 9 + (type == 'describe'), type)


def result_table(metrics):
    """The result by question type, as text."""
    columns = {key: name for key, name in dict(em='em', f1='f1', vqa='vqa', token_accuracy='token accuracy').items() if key in metrics}
    width = max(12, *map(len, metrics['by_type']))
    line = lambda key, m: ' | '.join([f'{printable(key):{width}}', f"{m['n']:6}", *(f'{m[c]:.3f}' if c in m else '-    ' for c in columns)])
    head = ' | '.join([f"{'type':{width}}", f"{'n':>6}", *(f'{name:5}' for name in columns.values())])
    questions = {t: m for t, m in metrics['by_type'].items() if t != 'describe'}
    captions = {t: m for t, m in metrics['by_type'].items() if t == 'describe'}
    return '\n'.join([head, '-' * len(head), *(line(t, m) for t, m in questions.items()), line('all', metrics),
                      f"{'mean of types':{width + 9}} | {metrics['em_types']:.3f}", *(line(t, m) for t, m in captions.items())])


# ----------------------------------------------------------------------------
# the encoder: retrieval, and what its tokens tell

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


# ----------------------------------------------------------------------------
# pictures

def picture_of(rows, i):
    """Raises: ValueError, naming the picture."""
    try:
        return open_picture(rows.pictures[rows.picture[i]])
    except ValueError as e:
        raise ValueError(f'{rows.pictures.names[rows.picture[i]]}: {e}: remove or repair it') from None


def draw_samples(path, rows, predictions, n=24, image_px=192):
    """Writes a sheet of samples, every type in turn, right answers in green and wrong ones in red (captions in black)."""
    by_type, chosen = {}, []
    for i in random.Random(0).sample(range(len(rows)), len(rows)):
        by_type.setdefault(rows.type[i], []).append(i)
    while len(chosen) < min(n, len(rows)):
        chosen += [queue.pop() for type in sorted(by_type, key=type_order) if (queue := by_type[type])]
    tiles, colors = [], []
    for i in chosen[:n]:
        picture, p = picture_of(rows, i).convert('RGB'), predictions[i]
        picture = picture.resize((image_px, image_px), Image.NEAREST if picture.width < image_px else Image.BICUBIC)
        tiles.append((picture, [p['question'], f"says: {p['prediction']}", f"true: {' / '.join(p['references'][:3])}"]))
        colors.append('black' if p['type'] == 'describe' else 'darkgreen' if p['em'] else 'firebrick')
    write_whole(path, lambda f: picture_sheet(tiles, scale=1, colors=colors).save(f, 'PNG'))


@torch.no_grad()
def draw_attention(path, decoder, encoder, tokenizer, rows, questions, device, types=('1 hop', '2 hops', 'count', 'relation'), image_px=112):
    """Writes a sheet that shows, for a question of each type, where every call of F looks while the first word of the answer is made:
    a row a call, in the picture (the attention to each image token, spread over the patches that the Perceiver made the token of) and
    in the question (red). Mean over heads and blocks, of y, or with recursion='add' of z and, in the last row, y.
    """
    font, tiles, colors = ImageFont.load_default(13), [], []
    chosen = [next((i for i, t in enumerate(rows.type) if t == type), None) for type in types]
    for i in [i for i in chosen if i is not None] or range(min(4, len(rows))):
        picture, read, watch = picture_of(rows, i), [], []
        patches = encoder.adapter(encoder.patches(encoder.preprocess(picture)[None].to(device)))   # (1, P, W)
        tokens = encoder.resampler(patches, read) if encoder.config.n_latents else patches
        vision = encoder.projection(tokens)[..., :decoder.config.vision_dim]           # (1, N, D)
        N, side = tokens.size(1), math.isqrt(patches.size(1))
        shares = torch.cat(read).mean((0, 1)) if read else torch.eye(N, device=device)       # (N, P)
        question = torch.tensor([questions.questions[i]], device=device)
        decoder.answer_states(decoder.read_context(vision, question), torch.tensor([[tokenizer.bos_id]], device=device), watch=watch)
        said = tokenizer.decode(decoder.generate(vision, question, questions.max_answer_tokens)[0].tolist())

        words = [printable(tokenizer.bpe.decode([t], errors='replace')) for t in questions.questions[i]]
        small = Image.fromarray(encoder.pixels(picture).permute(1, 2, 0).numpy()).resize((image_px, image_px), Image.BICUBIC)  # as it is seen
        strip = Image.new('RGB', (2 * image_px + 20 + int(sum(font.getlength(word) + 8 for word in words)), len(watch) * (image_px + 4)), 'white')
        draw = ImageDraw.Draw(strip)
        for step, (_, seen) in enumerate(watch):
            att = torch.stack([a[0, :, 0].float().mean(0) for a in seen]).mean(0)      # (S + T,), of the first state
            places, weights = (att[:N] @ shares.float())[-side * side:].view(side, side).cpu(), att[N:N + len(words)].cpu()
            heat = Image.fromarray((255 * places / places.max()).byte().numpy()).resize(small.size, Image.BICUBIC)
            x, y = 2 * image_px + 20, step * (image_px + 4)
            strip.paste(small, (0, y))
            strip.paste(Image.composite(small, Image.new('RGB', small.size), heat), (image_px + 4, y))
            draw.text((x, y + image_px // 2 - 30), f'step {step + 1}: {weights.sum():.0%} on the question', 'gray', font)
            for word, weight in zip(words, weights / weights.max()):
                draw.rectangle((x, y + image_px // 2 - 8, x + font.getlength(word) + 5, y + image_px // 2 + 12), (255, *[int(255 - 190 * weight)] * 2))
                draw.text((x + 3, y + image_px // 2 - 6), word, 'black', font)
                x += font.getlength(word) + 8
        tiles.append((strip, [rows.question[i], f"says: {said}, true: {' / '.join(rows.references[i][:3])}"]))
        colors.append('darkgreen' if exact_match(said, rows.references[i]) else 'firebrick')
    write_whole(path, lambda f: picture_sheet(tiles, columns=2, scale=1, colors=colors).save(f, 'PNG'))


def read_log(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]


def validation_curve(out_dir):
    """-> [(step, seconds of training until then, Exact Match), ...] of a run's validations."""
    curve, seconds = [], 0.
    for event in read_log(out_dir):
        seconds = event.get('train_s', seconds)
        if event['event'] == 'eval':
            curve.append((event['step'], seconds, event['em']))
    return curve


def draw_curves(out_dir):
    """Draws loss and Exact Match over the steps from log.jsonl to curves.png; without matplotlib, says how to get them."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print('curves.png not drawn: pip install matplotlib, then run eval.py on this folder')
        return
    events = read_log(out_dir)
    steps, evals = [[e for e in events if e['event'] == kind] for kind in ('step', 'eval')]
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot([e['step'] for e in steps], [e['loss'] for e in steps], label='training', linewidth=1)
    left.plot([e['step'] for e in evals], [e['loss'] for e in evals], 'o-', label='validation', markersize=3)
    left.set(xlabel='step', ylabel='loss, nats per token', yscale='log')
    left.legend()
    metric = evals[0]['metric'] if evals else 'em'
    right.plot([e['step'] for e in evals], [e[metric] for e in evals], 'o-', markersize=3, color='tab:green')
    right.set(xlabel='step', ylabel=f'validation {metric}', ylim=(0, 1))
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter('{x:g}')
    left.yaxis.set_minor_formatter('')
    for axes in (left, right):
        axes.grid(alpha=.3)
    figure.suptitle(str(out_dir))
    write_whole(Path(out_dir) / 'curves.png', lambda f: figure.savefig(f, format='png', dpi=110))


# ----------------------------------------------------------------------------
# runs on disk

def read_checkpoint(out_dir, unfinished=False):
    """Reads out_dir/ckpt.pt, tensors and plain types only; nothing in it is run.

    Raises: FileNotFoundError without one; ValueError when it is of another kind or format or, unless `unfinished`, before the first validation.
    """
    path = Path(out_dir) / 'ckpt.pt'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; a run writes it: python train.py config/trm.py --out_dir={out_dir}')
    checkpoint = safe_load(path)
    found = checkpoint.get('format') if isinstance(checkpoint, dict) else None
    if found == FORMAT and checkpoint['run']['best'] is None and not unfinished:
        raise ValueError(f'{path}: the run was stopped before its first validation: there are no weights to evaluate yet; the command that began it goes on')
    if found != FORMAT:
        raise ValueError(f'{path}: checkpoint format {found}, this code reads format {FORMAT}; train again, or use the code that '
                         f'wrote it')
    return checkpoint


def load_run(checkpoint, device):
    """The decoder, encoder and tokenizer of a checkpoint of the answer stage, with its best weights."""
    if checkpoint['stage'] != 'answer':
        raise ValueError(f"a checkpoint of stage '{checkpoint['stage']}' has no decoder: it trained an encoder, which "
                         f"--encoder=FILE gives to train.py")
    decoder = build_model(ModelConfig(**checkpoint['model_config']))
    best = checkpoint['run']['best']
    decoder.load_state_dict(best['decoder'])
    settings = checkpoint['settings']
    encoder = None
    if 'encoder' in best:  # trained along
        encoder = Encoder(EncoderConfig(**checkpoint['encoder_config']))
        encoder.load_state_dict(best['encoder'])
    elif settings['use_vision']:
        encoder = open_encoder(settings['encoder'], settings)
        if encoder.fingerprint() != checkpoint['encoder_fingerprint']:
            raise ValueError(f"{settings['encoder']}: not the encoder that this run was trained with (another fingerprint)")
    encoder = encoder.to(device).eval() if encoder else None
    return decoder.to(device).eval(), encoder, Tokenizer(checkpoint['tokenizer'])


def open_encoder(path, settings, **more):
    """`load_encoder` with what the settings of a run change of it."""
    return load_encoder(path, image_px=settings['encoder_px'], **{key: settings[key] for key in ('fit', 'upright', 'activation')}, **more)


def vision_source(settings, encoder, rows, device):
    """How to look at the pictures of a split: a function (encoder, picture indices (B,)) -> image tokens (B, N, D), which come
    from the cache where the encoder is frozen, else anew from the pixels, with gradient; None without vision."""
    if not settings['use_vision']:
        return lambda encoder, picture: None
    if settings['train_encoder'] or not settings['cache']:
        pixels = pixel_array(encoder, rows.pictures) if settings['cache'] else PixelReader(encoder, rows.pictures)
        trained = settings['train_encoder']
        encode = lambda encoder, images: encoder(images) if trained and torch.is_grad_enabled() else encoder.encode_images(images)  # a few at a time
        return lambda encoder, picture: encode(encoder, encoder.normalise(pixels[picture.cpu()].to(device)))[..., :settings['vision_dim']]
    features = in_turn(lambda: cached_features(encoder, rows.pictures, settings['cache_dir'], device, settings['vision_dim']))
    return lambda encoder, picture: features[picture.cpu()].to(device).float()  # halves travel


def write_results(out_dir, metrics, rows, predictions):
    """predictions.jsonl, samples.png, curves.png and, where rows have ten answers, vqav2_results.json of a run folder; then metrics.json, which says that the
    run is finished."""
    out_dir = Path(out_dir)
    write_whole(out_dir / 'predictions.jsonl', lambda f: f.writelines(json.dumps(p).encode() + b'\n' for p in predictions))
    if all('vqa' in p and p['sample_id'].isdecimal() for p in predictions):  # the official form of VQA v2
        results = [dict(question_id=int(p['sample_id']), answer=p['prediction']) for p in predictions]
        write_whole(out_dir / 'vqav2_results.json', lambda f: f.write(json.dumps(results).encode()))
    draw_samples(out_dir / 'samples.png', rows, predictions)
    draw_curves(out_dir)
    correct = ''.join('-' if p['type'] == 'describe' else str(int(p['em'])) for p in predictions)  # question by question, for paired comparisons
    write_whole(out_dir / 'metrics.json', lambda f: f.write(json.dumps(metrics | dict(correct=correct), indent=1).encode()))


def forgetful(decoder, which):
    """Makes every step of [y ; z] begin with the y, or the z, that the first one had: what the other state carries must then do."""
    first, start = cycle([True] + [False] * (decoder.config.calls - 1)), []

    def forget(block, args):
        h, rope, mask, *context = args
        if context:  # a step, not the pass over the context
            if next(first):
                start[:] = h.chunk(2, dim=1)
            y, z = h.chunk(2, dim=1)
            return torch.cat([start[0], z] if which == 'y' else [y, start[1]], dim=1), rope, mask, *context

    for block in decoder.blocks[::decoder.config.n_layer]:  # the first one of every step
        block.register_forward_pre_hook(forget)


# ----------------------------------------------------------------------------
# finished runs, side by side

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t of a two-sided 95 % interval, by degrees of freedom from 1 on


def spread(values):
    """-> the mean, and half the width of its 95 % interval over the seeds (Student's t); None where there is one value only."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None
    sd = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** .5
    return mean, (STUDENT[n - 2] if n < 11 else 2.2) * sd / n ** .5


def plus_minus(values, sign=''):
    mean, half = spread(values)
    return f'{mean:{sign}.3f}' + (f' ± {half:.3f}' if half is not None else '')


def grouped(paths):
    """Reads finished runs, folders or copies of a metrics.json -> {name: [metrics of every seed]}: runs that differ in their seed, place and speed alone
    belong together, each seed once; a setting that is newer than a run has its default there. What a pattern matches and is no finished run is left out, and said.
    Raises: FileNotFoundError, ValueError."""
    from train import FREE, TrainConfig
    groups, named = {}, {}
    for path, pattern in {path: p for p in map(str, paths) for path in sorted(glob(p)) or [p]}.items():
        file = Path(path) / 'metrics.json' if not path.endswith('.json') else Path(path)
        try:
            m = json.loads(file.read_text()) if file.is_file() else {}
        except ValueError as e:
            raise ValueError(f'{file}: not the metrics.json of a run: {e}') from None
        if missing := [key for key in ('by_type', 'correct', 'curve', 'mflop_per_example') if key not in m]:
            problem = (f'{file}: no {missing[0]}; --compare takes runs that answer questions and that train.py finished' if m else
                       f'{file}: no such file; --compare takes the folders of finished runs')
            if path == pattern:
                raise ValueError(problem) if m else FileNotFoundError(problem)
            print(f'left out: {problem}')
            continue
        same = asdict(TrainConfig()) | m['settings']
        same = {key: value for key, value in same.items() if key not in ('seed', *FREE)}
        key = json.dumps(same, sort_keys=True)
        while m['seed'] in {other['seed'] for _, other in groups.get(key, ())}:
            key += '+'
        groups.setdefault(key, []).append((path.removesuffix('.json'), m))
    if not groups:
        raise ValueError(f'--compare: no finished run among {", ".join(map(str, paths))}')
    for runs in groups.values():
        name = re.sub('[-_]+$', '', os.path.commonprefix([path for path, _ in runs])) if len(runs) > 1 else runs[0][0]
        named[name if name not in named else f'{name} ({len(named) + 1})'] = [m for _, m in runs]
    return named


def depth(m):
    """How many blocks an answer position goes through, one after the other."""
    config = ModelConfig(**{key: m['settings'][key] for key in ('kind', 'n_layer', 'recursion', 'inner_steps', 'outer_steps')})
    return config.n_layer * config.calls


def training_flops(m):
    return m['mflop_per_example'] * 1e6 * m['step'] * m['settings']['batch_size'] * m['settings']['grad_accum']


def paired(runs, base):
    """The difference in Exact Match, question by question, of the means over the seeds -> mean, and half the width of its 95 % interval over the
    questions; None where the runs did not answer the same questions, or none but captions."""
    rows = [[m['correct'] for m in group] for group in (runs, base)]
    if len({(m['settings']['dataset'], re.sub(r'\d', 'x', m['correct'])) for m in (*runs, *base)}) > 1:
        return None
    asked = [i for i, c in enumerate(rows[0][0]) if c != '-']
    if not asked:
        return None
    ours, theirs = ([sum(row[i] == '1' for row in group) / len(group) for i in asked] for group in rows)
    d = [a - b for a, b in zip(ours, theirs)]
    mean = sum(d) / len(d)
    return mean, 1.96 * (sum((x - mean) ** 2 for x in d) / len(d)) ** .5 / len(d) ** .5


def by_seed(runs, base, score):
    """The differences in `score` between runs of the same seed, a list."""
    ours, theirs = ({m['seed']: score(m) for m in group} for group in (runs, base))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def reached(m, em):
    """The first step at which validation had this Exact Match, with the seconds of training until then, as text."""
    return next((f'{step} ({seconds:.0f} s)' for step, seconds, there in m['curve'] if there >= em), 'never')


def compare(paths, judged=None, reach=None):
    """Two tables of finished runs, mean and 95 % interval over the seeds: what they are and what they have in the mean over the question types `judged`
    (all), each also against the first one; and every type. With matplotlib comparison.png and comparison_curves.png beside the first. -> text"""
    groups = grouped(paths)
    types = sorted({t for runs in groups.values() for m in runs for t in m['by_type']}, key=type_order)
    for name, runs in groups.items():
        if missing := [t for t in judged or () if any(t not in m['by_type'] for m in runs)]:
            raise ValueError(f"--types={','.join(missing)}: {name} has no such type; expected some of {', '.join(types)}")
    score = lambda m: sum(m['by_type'][t]['em'] for t in judged) / len(judged) if judged else m['em_types']
    first = next(iter(groups.values()))
    about, scores = [], []
    for name, runs in groups.items():
        m, other = runs[0], runs is not first
        seeds, questions = other and by_seed(runs, first, score), other and paired(runs, first)
        about.append({
            'run': printable(name), 'seeds': len(runs), 'core': f"{m['parameters']['core']:,}", 'total': f"{m['parameters']['total']:,}", 'depth': depth(m),
            'training steps': m['step'], 'TFLOP': f'{spread([training_flops(r) for r in runs])[0] / 1e12:.1f}', 'min': f"{spread([r['train_s'] for r in runs])[0] / 60:.1f}",
            'mean of types': plus_minus([score(r) for r in runs]), 'by seed': ' '.join(f'{score(r):.3f}' for r in runs),
            'minus the first': plus_minus(seeds, sign='+') if seeds else '-', 'em minus the first': f'{questions[0]:+.3f} ± {questions[1]:.3f}' if questions else '-'}
            | ({f'validation {reach:g} at training step': ', '.join(reached(r, reach) for r in runs)} if reach else {}))
        of_type = lambda t: [r['by_type'][t]['f1' if t == 'describe' else 'em'] for r in runs if t in r['by_type']]
        scores.append({'run': printable(name)} | {key: plus_minus([r[key] for r in runs]) for key in ('em', 'f1')}
                      | {printable(t): plus_minus(of_type(t)) if of_type(t) else '-' for t in types})
    draw_comparison(groups, Path((sorted(glob(str(paths[0]))) or paths)[0]).parent)
    made = sorted({f"{m['commit']} on {m['device']}, {m['threads']} threads" for runs in groups.values() for m in runs})
    return ('\n'.join(table(list(rows[0]), [list(row.values()) for row in rows]) for rows in (about, scores)) +
            f"\nmean of types: {', '.join(judged or ['all'])}; ±: 95 % interval over the seeds, of `minus the first` over the differences between runs of one seed, of `em minus the"
            f" first` over the questions; describe: f1\nTFLOP, min: of the whole training; depth: blocks in a row for an answer token; commit {'; '.join(made)}")


def draw_comparison(groups, folder):
    """Draws Exact Match and F1 against depth, parameters and FLOPs to comparison.png, the validation curves and the question types to comparison_curves.png."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('comparison.png not drawn: pip install matplotlib')
        return
    styles = {name: dict(color=f'C{k % 10}', label=printable(label).replace('$', '')) for k, (name, label) in enumerate(zip(groups, labels(groups)))}
    for file, size, draw in (('comparison.png', (13, 7.5), draw_results), ('comparison_curves.png', (13, 4), draw_courses)):
        figure = Figure(figsize=size, layout='constrained')
        axes = draw(figure, groups, styles)
        for axis in axes:
            axis.grid(alpha=.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
        write_whole(folder / file, partial(figure.savefig, format='png', dpi=100))


def labels(names):
    """The names of files without the words, between underscores, that all of them begin or end with."""
    words = [os.path.basename(name).split('_') for name in names]
    for end in (0, -1):
        while len({w[end] for w in words}) == 1 < min(len(words), *map(len, words)):
            words = [w[1:] if end == 0 else w[:-1] for w in words]
    return ['_'.join(w) for w in words]


def draw_results(figure, groups, styles):
    """Exact Match and F1 against depth, parameters and FLOPs. -> axes"""
    words = lambda x: f'{x:.3g}' if x < 1e3 else f'{x / 1e3:.3g}k' if x < 1e6 else f'{x / 1e6:.3g}M'
    axes = figure.subplots(2, 3, sharey='row')
    places = {'blocks in a row for an answer token': depth, 'core parameters': lambda m: m['parameters']['core'],
              'TFLOP of the whole training': lambda m: training_flops(m) / 1e12}
    for row, key in zip(axes, ('em', 'f1')):
        for axis, (label, place) in zip(row, places.items()):
            at = sorted({place(runs[0]) for runs in groups.values()})
            for k, (name, runs) in enumerate(groups.items()):
                mean, half = spread([m[key] for m in runs])
                beside = 1.01 ** (k - len(groups) / 2)  # so that equals do not hide each other
                axis.errorbar(place(runs[0]) * beside, mean, half or 0, fmt='o', capsize=3, **styles[name])
            axis.set(xlabel=label, xscale='log', xlim=(at[0] / 1.3, at[-1] * 1.3))
            axis.set_xticks([x for i, x in enumerate(at) if i == 0 or x > 1.1 * at[i - 1]])
            axis.xaxis.set_major_formatter(lambda x, _: words(x))
            axis.minorticks_off()
        row[0].set_ylabel({'em': 'Exact Match', 'f1': 'token F1'}[key])
    return axes.flatten()


def draw_courses(figure, groups, styles):
    """Validation curves by training step and by FLOPs, which do not depend on the machine, the mean over the seeds, and the test split by question type. -> axes"""
    left, middle, right = axes = figure.subplots(1, 3)
    types = sorted({t for runs in groups.values() for t in runs[0]['by_type'] if t != 'describe'}, key=type_order)
    for name, runs in groups.items():
        steps, _, em = torch.tensor([m['curve'] for m in runs]).mean(0).T
        for axis, times in ((left, steps), (middle, steps * training_flops(runs[0]) / runs[0]['step'] / 1e12)):
            axis.plot(times, em, '-', linewidth=1.2, **styles[name])
        values = [spread([m['by_type'][t]['em'] for m in runs if t in m['by_type']] or [math.nan]) for t in types]
        right.errorbar(range(len(types)), [v for v, _ in values], [h or 0 for _, h in values], fmt='o-', capsize=3, markersize=3, linewidth=1.2, **styles[name])
    left.set(xlabel='training step', ylabel='validation Exact Match')
    middle.set(xlabel='TFLOP of training')
    right.set(ylabel='test Exact Match', ylim=(0, 1.03))
    right.set_xticks(range(len(types)), types, rotation=40, ha='right')
    return axes


def report_alignment(settings, checkpoint, device):
    """Prints retrieval, and of drawn pictures the probe, of a run of stage align."""
    from train import AlignTask, TrainConfig
    if settings.attention or settings.states or settings.forget or settings.inner_steps or settings.outer_steps:
        raise ValueError(f'{settings.out_dir}: a run of stage align has no recursion to look at')
    run = checkpoint['settings']
    task = AlignTask(TrainConfig(**run | dict(dataset=settings.dataset or run['dataset'], wandb=False)), device, checkpoint, splits=())
    task.model.load_state_dict(checkpoint['run']['best']['model'])
    task.report(task.model.to(device).eval(), settings.split)


def answer_one(path, question, decoder, encoder, tokenizer, most_tokens, device, **sampling):
    """The answer to a question about a picture file. Raises: FileNotFoundError, ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'--image={path}: no such file')
    vision = encoder.encode_images(picture_from(path, encoder)[None].to(device))[..., :decoder.config.vision_dim] if encoder else None
    ids = tokenizer.encode(question.lower() if tokenizer.lower_case else question)
    if not ids:
        raise ValueError('--question is empty')
    return tokenizer.decode(decoder.generate(vision, torch.tensor([ids], device=device), most_tokens, **sampling)[0].tolist())


def rows_to_judge(dataset, split):
    """The rows of a split. Raises: ValueError where there are none; see `data.read_rows`."""
    rows = read_rows(dataset, split)
    if not len(rows):
        raise ValueError(f'{rows.path}: has no rows, there is nothing to evaluate')
    return rows


def main(argv=None):
    settings, _ = configure(EvalConfig, sys.argv[1:] if argv is None else argv, 'eval.py')
    if settings.compare:
        print(compare(settings.compare.split(','), settings.types and settings.types.split(','), settings.reach))
        return
    if settings.majority or settings.question_only:
        dataset = settings.dataset or read_checkpoint(settings.out_dir)['settings']['dataset']
        print(result_table(baseline(rows_to_judge(dataset, 'train'), rows_to_judge(dataset, settings.split), settings.question_only)))
        return
    device = pick_device(settings.device)
    checkpoint = read_checkpoint(settings.out_dir)
    run = checkpoint['settings']
    if checkpoint['stage'] == 'align' and not settings.image:
        report_alignment(settings, checkpoint, device)
        return
    decoder, encoder, tokenizer = load_run(checkpoint, device)
    for key in ('inner_steps', 'outer_steps'):
        if getattr(settings, key) is not None:
            if decoder.config.kind == 'plain':
                raise ValueError(f'--{key}: {settings.out_dir} holds a plain decoder, which takes no steps')
            if not decoder.config.shared:
                raise ValueError(f'--{key}: {settings.out_dir} holds a decoder whose steps have blocks of their own, which takes no more steps than it has, and no fewer')
            decoder.config = replace(decoder.config, **{key: getattr(settings, key)})
    if settings.states and not decoder.config.shared:
        raise ValueError(f'--states: {settings.out_dir} holds a decoder whose steps have blocks of their own, which takes no more steps than it has')
    if settings.forget:
        if decoder.config.streams < 2:
            raise ValueError(f"--forget: {settings.out_dir} holds a decoder whose steps have no y and z side by side; expected recursion='concat'")
        forgetful(decoder, settings.forget)
    generator = torch.Generator(device).manual_seed(settings.seed)
    sampling = dict(temperature=settings.temperature, top_k=settings.top_k, generator=generator)

    if settings.image:
        print(printable(answer_one(settings.image, settings.question, decoder, encoder, tokenizer, run['max_answer_tokens'], device, **sampling)))
        return
    rows = rows_to_judge(settings.dataset or run['dataset'], settings.split)
    questions = Questions(rows, tokenizer, run['max_question_tokens'], run['max_answer_tokens'], truncate=True)
    if settings.attention:
        if not encoder:
            raise ValueError(f'{settings.out_dir}: a run without vision has no picture to look at')
        draw_attention(Path(settings.out_dir) / 'attention.png', decoder, encoder, tokenizer, rows, questions, device)
        print(f'written: {settings.out_dir}/attention.png')
        return
    vision_of = partial(vision_source(run, encoder, rows, device), encoder)
    if settings.states:
        batch = on_device(questions.batch(next(questions.rows_in_order(settings.batch_size))), device)
        sizes = state_sizes(decoder, vision_of(batch['picture']), batch['question'], batch['answer'])
        for n in (1, 2, 4, 8, 16, 32, 64):
            print(f'after {n:2} steps: ' + ', '.join(f'RMS of {name} {size:.2f}' for name, size in zip('yz', sizes[n - 1]) if size))
        return
    metrics, predictions = evaluate(decoder, questions, vision_of, device, settings.batch_size, **sampling)
    print(result_table(metrics))
    usual = EvalConfig(out_dir=settings.out_dir, batch_size=settings.batch_size, device=settings.device)
    before = Path(settings.out_dir) / 'metrics.json'
    if settings != usual:
        print('nothing written: these are not the settings of the run itself')
    elif not before.is_file() or checkpoint['run']['step'] < run['max_steps']:
        print('nothing written: the run is not finished; the command that began it goes on')
    else:  # the run's own test result
        with locked(Path(settings.out_dir) / '.lock'):
            write_results(settings.out_dir, json.loads(before.read_text()) | metrics, rows, predictions)
        print(f'written: {settings.out_dir}/metrics.json, predictions.jsonl, samples.png')


if __name__ == '__main__':
    run_script(main)
