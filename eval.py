"""
Evaluation: Exact Match, token F1 and token accuracy by question type; retrieval for the encoder; answering; pictures.

    python eval.py --out_dir=out/trm                                          # the test split again, with all its files
    python eval.py --out_dir=out/trm --image=cat.jpg --question="what is it?" # one picture of your own
    python eval.py --out_dir=out/trm --attention=true                         # where every step of the recursion looks
    python eval.py --out_dir=out/trm --states=true                            # how large the states are over 64 steps
    python eval.py --compare=out/trm,out/plain                                # finished runs side by side
"""

import json
import random
import re
import string
import sys
import time
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from configurator import configure
from data import Questions, Tokenizer, read_rows
from encoder import Encoder, EncoderConfig, open_encoder
from model import ModelConfig, build_model
from plumbing.console import printable, progress, run_script
from plumbing.features import picture_from, vision_source
from plumbing.files import locked, write_whole
from plumbing.machine import on_device, pick_device
from plumbing.pictures import open_picture, picture_sheet
from plumbing.plots import draw_curves
from plumbing.ranks import from_all, rank_and_world
from plumbing.run import read_checkpoint
from plumbing.tables import OnDisk, View
from prepare.vqav2 import vqa_accuracy


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


# ----------------------------------------------------------------------------
# a split, evaluated


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


# ----------------------------------------------------------------------------
# runs on disk


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


# ----------------------------------------------------------------------------
# finished runs, side by side


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
