"""
Evaluation: Exact Match, token F1 and token accuracy by question type; answers; a sheet of samples.

    python eval.py --out_dir=out/trm                       # the test split again, and its files
    python eval.py --out_dir=out/trm --inner_steps=64      # with other passes than in training
    python eval.py --out_dir=out/trm --image=cat.jpg --question="what is it?"    # a picture of your own
    python eval.py --out_dir=out/trm --image=cat.jpg        # asks for one question after the other
    python eval.py --out_dir=out/sounds --sound=beeps.wav   # about a sound, or with --image about both
"""

import json
import re
import string
import sys
import time
from array import array
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from configurator import configure
from data import Questions, open_tokenizer, read_rows
from encoder import EncoderConfig, build_encoder, encoder_names, encoder_of_run
from model import Halting, ModelConfig, build_model
from plumbing.console import printable, progress, run_script, typed_lines
from plumbing.features import ContextTokens, picture_from
from plumbing.files import locked
from plumbing.graphs import writer_of
from plumbing.machine import on_device
from plumbing.novelty import doubts
from plumbing.ranks import from_all, processes, rank_and_world
from plumbing.results import result_table, type_order, write_results
from plumbing.run import decoder_settings, other_weights, read_checkpoint
from plumbing.tables import OnDisk, View
from prepare.vqav2 import vqa_accuracy

SUMMED = ('em', 'f1', 'equal', 'vqa', 'tokens', 'hits', 'loss', 'passes')    # whose means a table shows


@dataclass
class EvalConfig:
    out_dir: str = 'out/trm'        # the run to evaluate
    split: str = 'test'             # train, val or test
    dataset: str | None = None      # another dataset folder than the one of the run, or where that lies now
    wrong_pictures: bool = False    # a control: every question about the picture of another one
    encoder: str | None = None      # where the encoder of the run lies now
    sound_encoder: str | None = None    # the same of its encoder of sounds
    image: str | None = None        # a picture file: answer `question` about it instead
    sound: str | None = None        # a sound file, beside `image` or instead of it
    question: str | None = None     # the question about them; None: it asks for one after the other
    inner_steps: int | None = None  # test-time depth: another number of passes than in training
    outer_steps: int | None = None  # the same for the cycles
    halt: float | None = None       # a token's passes end at a move below this share of its states' RMS
    temperature: float = 0.0        # 0: the likeliest token; above: draw tokens
    top_k: int | None = None        # with a temperature: draw from the k likeliest only
    seed: int = 1337                # of the drawing
    batch_size: int | None = None   # rows at a time; None: as in training, 256 at most
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...
    graphs: bool = True             # on a GPU: launch the kernels of a token in one go

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')
        if self.top_k and not self.temperature:
            raise ValueError('--top_k goes with a --temperature above 0')
        if self.halt is not None and self.halt <= 0:
            raise ValueError(f'halt={self.halt}: expected more than 0')
        for key in ('image', 'sound', 'question', 'dataset', 'encoder', 'sound_encoder'):
            if getattr(self, key) == '':  # an unset variable, say
                raise ValueError(f'--{key} is empty')
        if self.question is not None and self.image is None and self.sound is None:
            raise ValueError('--question: about what? --image=FILE or --sound=FILE says so')
        for key, least in dict(batch_size=1, temperature=0, top_k=1, inner_steps=1, outer_steps=1).items():
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least {least}')


# ----------------------------------------------------------------------------
# metrics

ARTICLES = r'\b(a|an|the)\b'


def normalize_answer(text):
    """Lower case, without ASCII punctuation, articles, extra space. Source: SQuAD, evaluate-v2.0.py."""
    return ' '.join(re.sub(ARTICLES, ' ', without_signs(text)).split())


def without_signs(text):
    """Lower case, without ASCII punctuation."""
    return ''.join(ch for ch in text.lower() if ch not in string.punctuation)


def comparable(text):
    """`normalize_answer`, but what that would empty keeps its words, or signs: A is not the, + is not -."""
    kept = normalize_answer(text) or without_signs(text).strip() or text.lower()
    return ' '.join(kept.split())


def gold_answers(references):
    """The comparable references; those that are empty then do not count, unless all are."""
    references = [references] if isinstance(references, str) else references
    normalised = [comparable(reference) for reference in references]
    return [gold for gold in normalised if gold] or ['']


def exact_match(prediction, references):
    """1.0 if the prediction equals a reference (a string or a list of them) when normalised, else 0.0."""
    return float(comparable(prediction) in gold_answers(references))


def token_f1(prediction, references):
    """Overlap of normalised tokens, the best over the references, in 0..1."""
    return max(f1(comparable(prediction).split(), gold.split()) for gold in gold_answers(references))


def f1(predicted, gold):
    """F1 of two lists of words; two empty answers agree, one empty one does not."""
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    if not common:
        return 0.0
    precision = common / len(predicted)
    recall = common / len(gold)
    return 2 * precision * recall / (precision + recall)  # in the order of SQuAD's script, to the last bit


def merged_answers(predictions):
    """Reference answers that differ by more than an end mark and count as equal: ['-5 = 5', 'c++ = c']."""
    seen = {}    # of a normalised answer, how it was written first
    merged = {}
    for p in predictions:
        if p['type'] == 'describe':
            continue
        for reference in p['references']:
            written = ' '.join(re.sub(ARTICLES, ' ', reference.lower()).split()).rstrip('.!?,;:')
            first = seen.setdefault(comparable(reference), written)
            if first != written:
                merged[f'{written[:80]} = {first[:80]}'] = None
    return list(merged)


# ----------------------------------------------------------------------------
# a split, evaluated

def teacher_forced(decoder, batch, vision, sound=None):
    """Losses and hits of every target of a batch.

    Shapes: as `Questions.batch`, vision (B, N, D), sound (B, M, D) -> loss (B, A) nats, hit (B, A) bool,
        real (B, A) bool.
    """
    logits, _ = decoder(vision, batch['question'], batch['answer'], sound=sound)           # (B, A, V)
    real = batch['targets'] >= 0
    by_class = logits.transpose(1, 2).float()                                              # (B, V, A)
    loss = F.cross_entropy(by_class, batch['targets'], ignore_index=-100, reduction='none')
    hit = (logits.argmax(-1) == batch['targets']) & real
    return loss, hit, real


@torch.no_grad()
def quick_scores(decoder, questions, tokens_of, device, batch_size=250, most_rows=2000):
    """Loss and a strict Exact Match of a split without generating: the very tokens of the first reference.
    Processes share the work. `batch_size` is that of training, which had the memory for it; 250 at most.

    Greedy generation gives exactly the (first) reference if and only if every one of its tokens is the
    likeliest after the true ones before it. Captions count for the loss only.
    `tokens_of`: as `ContextTokens`, a batch -> image tokens (B, N, D), sound tokens (B, M, D)
    """
    loss = 0
    n_targets = 0
    right = 0
    asked = 0
    rank, world = rank_and_world()
    for rows in islice(questions.rows_in_order(min(250, batch_size), most_rows), rank, None, world):
        batch = on_device(questions.batch(rows), device)
        losses, hit, real = teacher_forced(decoder, batch, *tokens_of(batch))              # (B, A) each
        is_question = [questions.rows.type[i] != 'describe' for i in rows]
        is_question = torch.tensor(is_question, device=device)                             # (B,)
        loss += losses.sum().item()
        n_targets += real.sum().item()
        right += ((hit == real).all(1) & is_question).sum().item()
        asked += is_question.sum().item()
    loss, n_targets, right, asked = map(sum, zip(*from_all((loss, n_targets, right, asked))))
    return {'loss': loss / n_targets, 'em': right / max(asked, 1)}


@torch.no_grad()
def evaluate(decoder, questions, tokens_of, device, batch_size=256, halt=None, **sampling):
    """Answers a whole split -> metrics, a dict, and predictions, dicts in the order of the split, on disk.

    'em' and 'f1' are means over the questions; captions ('describe' rows) stand apart under their type, as
    Exact Match means little for them; 'em_types' is the mean over the question types; 'tokens_per_s' counts
    those written in the seconds of the whole evaluation. With `halt`, 'passes' is the mean over the answers
    of the passes a token took, and there is no loss: true tokens go through all passes. Processes share the
    work.
    `tokens_of`: as `ContextTokens`, a batch -> image tokens (B, N, D), sound tokens (B, M, D)
    """
    rows = questions.rows
    tokenizer = questions.tokenizer
    start = time.time()
    n_tokens = 0
    n_done = 0
    order = array('q')  # the rows of this process, as they come
    mine = OnDisk()     # their predictions
    rank, world = rank_and_world()
    for indices in islice(questions.rows_in_order(batch_size), rank, None, world):
        batch = on_device(questions.batch(indices), device)
        vision, sound = tokens_of(batch)
        cache = Halting(halt) if halt else None
        answers = decoder.generate(vision, batch['question'], questions.max_answer_tokens, cache=cache,
                                   sound=sound, **sampling)
        if halt:
            more = [dict(passes=n) for n in passes_per_token(cache.taken, answers != tokenizer.pad_id)]
        else:
            sums = [t.sum(1).tolist() for t in teacher_forced(decoder, batch, vision, sound)]   # of every row
            more = [dict(loss=loss, hits=hits, tokens=n) for loss, hits, n in zip(*sums)]
        answers = answers.tolist()
        for k, i in enumerate(indices.tolist()):
            n_tokens += sum(token != tokenizer.pad_id for token in answers[k])
            order.append(i)
            mine.append(scored(rows, i, tokenizer.decode(answers[k])) | more[k])
        n_done = min(n_done + world * len(indices), len(rows))
        progress('evaluating', n_done, len(rows), start)
    print()

    everything = OnDisk()
    place = array('q', [-1]) * len(rows)  # of a row's prediction in `everything`
    written = 0
    for n, order_there, predictions_there in from_all((n_tokens, order, list(mine) if world > 1 else mine)):
        written += n
        for i, prediction in zip(order_there, predictions_there):
            place[i] = len(everything)
            everything.append(prediction)

    def prediction_of(i):
        return everything[place[i]]

    predictions = View(place.__len__, prediction_of)
    seconds = time.time() - start
    return summaries(predictions) | dict(tokens_per_s=written / seconds, eval_s=seconds), predictions


def passes_per_token(taken, written):
    """For every answer the mean passes of its tokens.
    Shapes: taken, (B,) for each token; written, bool (B, A) -> B floats, a list"""
    taken = torch.stack(taken, dim=1)                                                      # (B, A or fewer)
    written = written[:, :taken.size(1)]
    return ((taken * written).sum(1) / written.sum(1).clamp(min=1)).tolist()


def scored(rows, i, text):
    """A prediction for a row with what it is worth: 'em', 'f1', 'equal' (the very string, as GQA counts) and,
    where ten people answered, 'vqa'."""
    references = rows.references[i]
    prediction = dict(sample_id=rows.sample_id[i], type=rows.type[i], question=rows.question[i],
                      prediction=text, references=references, em=exact_match(text, references),
                      f1=token_f1(text, references), equal=float(text in references))
    if len(references) == 10:
        prediction['vqa'] = vqa_accuracy(text, references)
    return prediction


def summaries(predictions):
    """Means over all questions and by type. Captions ('describe') stand apart under their type; 'em_types' is
    the mean over the others."""
    sums = {}
    for p in predictions:
        numbers = {key: p[key] for key in SUMMED if key in p} | dict(n=1, ten='vqa' in p)
        sums.setdefault(p['type'], Counter()).update(numbers)
        if p['type'] != 'describe':
            sums.setdefault(None, Counter()).update(numbers)
    by_type = {type: summary(sums[type]) for type in sorted(filter(None, sums), key=type_order)}
    question_types = [type for type in by_type if type != 'describe'] or list(by_type)
    em_types = sum(by_type[type]['em'] for type in question_types) / len(question_types)
    over_types = dict(em_types=em_types, by_type=by_type, merged=merged_answers(predictions))
    return summary(sums.get(None) or sums['describe']) | over_types


def summary(sums):
    n = sums['n']
    result = dict(n=n) | {key: sums[key] / n for key in ('em', 'f1', 'equal')}
    if sums['ten'] == n:
        result['vqa'] = sums['vqa'] / n
    if sums['passes']:
        result['passes'] = sums['passes'] / n
    if sums['tokens']:
        result |= dict(token_accuracy=sums['hits'] / sums['tokens'], loss=sums['loss'] / sums['tokens'])
    return result


# ----------------------------------------------------------------------------
# a finished run, and what it answers

def load_run(checkpoint, device, encoder_path=None, sound_encoder_path=None):
    """The decoder of a checkpoint with its best weights, its encoders, {'encoder': of pictures,
    'sound_encoder': of sounds} as far as it has them, and its tokenizer. The paths: where they lie now, if
    not where they did. Raises: ValueError; FileNotFoundError."""
    if checkpoint['stage'] != 'answer':
        raise ValueError(f"a checkpoint of stage '{checkpoint['stage']}' has no decoder: it trained an "
                         f"encoder, which --encoder=FILE gives to train.py; python -m align.judge "
                         f"--out_dir={checkpoint['settings']['out_dir']} reports on it")
    settings = checkpoint['settings']
    decoder = fitted(checkpoint, 'decoder', build_model, ModelConfig, decoder_settings(checkpoint))
    best = checkpoint['run']['best']
    moved = dict(encoder=encoder_path, sound_encoder=sound_encoder_path)
    moved = {name: path for name, path in moved.items() if path}
    for name, path in moved.items():
        if name in best or name not in encoder_names(settings):
            raise ValueError(f"--{name}={path}: {settings['out_dir']} needs no file of an encoder")
    encoders = {}
    for name in encoder_names(settings):
        if name in best:  # trained along
            config = checkpoint[f'{name}_config']
            encoders[name] = fitted(checkpoint, name, build_encoder, EncoderConfig, config).to(device).eval()
            continue
        encoders[name] = encoder_of_run(name, settings | moved, checkpoint).to(device).eval()
        if encoders[name].fingerprint() != checkpoint[f'{name}_fingerprint']:
            raise ValueError(f'{(settings | moved)[name]}: not the {name} that this run was trained with '
                             f'(another fingerprint); --{name}=PATH says where that lies now')
    return decoder.to(device).eval(), encoders, open_tokenizer(checkpoint['tokenizer'])


def fitted(checkpoint, part, build, config_class, config):
    """A part of a run with its best weights. Raises: ValueError naming what of it this code does not know."""
    weights = checkpoint['run']['best'][part]
    unknown = sorted(config.keys() - {f.name for f in fields(config_class)})
    problem = f'no setting {", ".join(unknown)}' if unknown else None
    if not problem:
        try:
            module = build(config_class(**config))
            other = other_weights(module, weights)
            problem = f'other weights {", ".join(other[:4])}' if other else None
        except ValueError as e:
            problem = str(e)
    if problem:
        commit = checkpoint.get('environment', {}).get('commit', 'unknown')
        raise ValueError(f"{checkpoint['settings']['out_dir']}: its {part} does not fit this code "
                         f"({problem}); commit {commit} made the run and can read it")
    module.load_state_dict(weights)
    return module


def ids_of(question, tokenizer, most=None):
    """The tokens of a typed question, a list. Raises: ValueError where there are none or more than `most`."""
    ids = tokenizer.encode_question(question.lower() if tokenizer.lower_case else question)
    if not question or not ids:
        raise ValueError('--question is empty')
    if most and len(ids) > most:
        raise ValueError(f'the question has {len(ids)} tokens: expected {most} at most, as in training')
    return ids


def look_at(flag, path, encoder):
    """The tokens of a picture or sound file; None without a file, or where the run takes none in.
    Shapes: -> (1, N, D). Raises: FileNotFoundError, ValueError."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f'--{flag}={path}: no such file')
    if not encoder:
        return None
    image = picture_from(path, encoder)[None]                                              # (1, 3, S, S)
    return encoder.encode_images(image)                                                    # (1, N, D)


def answer_one(question, vision, sound, decoder, tokenizer, settings, seen, halt=None, **sampling):
    """The answer to a question about a picture, a sound or both; where that is unlike what the run has `seen`
    in training, this is said. settings: of the run. Raises: ValueError.
    Shapes: vision (1, N, D) and sound (1, M, D), each may be None"""
    ids = ids_of(question, tokenizer, settings['max_question_tokens'])
    if vision is not None:
        vision = vision[..., :decoder.config.vision_dim]                                   # (1, N, D)
    for doubt in doubts(seen, question, vision):
        print(f'take the answer with care: {printable(doubt)}', file=sys.stderr)
    asked = torch.tensor([ids], device=decoder.embed.weight.device)                        # (1, Q)
    cache = Halting(halt) if halt else None
    written = decoder.generate(vision, asked, settings['max_answer_tokens'], cache=cache, sound=sound,
                               **sampling)
    return printable(tokenizer.decode(written[0].tolist()))


def answer_all(answer):
    """Answers one question after the other, typed or from a pipe. A bad one gets a sentence.
    answer: a function of a question"""
    for question in typed_lines('question: '):
        try:
            print(answer(question), flush=True)
        except ValueError as e:
            print(printable(str(e)), file=sys.stderr)


def rows_to_judge(dataset, split):
    """The rows of a split. Raises: ValueError where there are none; see `data.read_rows`."""
    rows = read_rows(dataset, split)
    if not len(rows):
        raise ValueError(f'{rows.path}: has no rows, there is nothing to evaluate')
    return rows


def questions_to_judge(settings, dataset, split, tokenizer, few_shapes=False):
    """A split as tokens, of the `dataset` folder or, without one, of the run's own. settings: of the run."""
    rows = rows_to_judge(dataset or settings['dataset'], split)
    most = settings['max_question_tokens'], settings['max_answer_tokens']
    return Questions(rows, tokenizer, *most, truncate=True, few_shapes=few_shapes)


def set_depth(decoder, out_dir, inner_steps, outer_steps, halt=None):
    """Gives a decoder other numbers of passes and cycles than it was trained with; None: leaves them.
    `halt` is only checked."""
    for key, value in dict(inner_steps=inner_steps, outer_steps=outer_steps).items():
        if value is not None:
            if decoder.config.kind == 'plain':
                raise ValueError(f'--{key}: {out_dir} holds a plain decoder, which takes no steps')
            decoder.config = replace(decoder.config, **{key: value})
    c = decoder.config
    if halt and (c.kind == 'plain' or c.recursion not in ('concat', 'loop') or c.recur_layers < c.n_layer):
        raise ValueError(f"--halt: {out_dir} holds no TRM of recursion='concat' or 'loop', whose passes make "
                         'all states anew, in all blocks')


def of_another(tokens_of, n, batch):
    """The tokens of a batch with other pictures than those that are asked about, the same ones every time.
    n: pictures, by whose numbers `batch` names them"""
    picture = batch['picture']                                                             # (B,)
    return tokens_of(batch | dict(picture=torch.where(picture < 0, picture, (picture + n // 2) % n)))


def main(argv=None):
    s, _ = configure(EvalConfig, sys.argv[1:] if argv is None else argv, 'eval.py')
    with processes(s) as device:
        judge(s, device)


def judge(s, device):
    """Answers questions about a picture or sound, or evaluates a split. Processes share the work."""
    checkpoint = read_checkpoint(s.out_dir)
    settings = checkpoint['settings']
    decoder, encoders, tokenizer = load_run(checkpoint, device, s.encoder, s.sound_encoder)
    set_depth(decoder, s.out_dir, s.inner_steps, s.outer_steps, s.halt)
    generator = torch.Generator(device).manual_seed(s.seed)
    sampling = dict(temperature=s.temperature, top_k=s.top_k, generator=generator)
    if s.image or s.sound:
        if s.sound and 'sound_encoder' not in encoders:
            raise ValueError(f'--sound: {s.out_dir} is of a run that hears nothing; it was trained without '
                             '--use_sound=true')
        vision = look_at('image', s.image, encoders.get('encoder'))
        sound = look_at('sound', s.sound, encoders.get('sound_encoder'))
        answer = partial(answer_one, vision=vision, sound=sound, decoder=decoder, tokenizer=tokenizer,
                         settings=settings, seen=checkpoint.get('seen', {}), halt=s.halt, **sampling)
        if s.question:
            print(answer(s.question))
        else:
            answer_all(answer)
        return

    # with halting, the host has to know when a token has settled
    writer = writer_of(decoder, device) if s.graphs and not s.halt else None
    questions = questions_to_judge(settings, s.dataset, s.split, tokenizer, few_shapes=writer is not None)
    rows = questions.rows
    tokens_of = ContextTokens(settings, encoders, rows, device)
    if s.wrong_pictures:
        if len(rows.pictures) < 2:
            raise ValueError(f'--wrong_pictures: the {s.split} split has no other picture')
        tokens_of = partial(of_another, tokens_of, len(rows.pictures))
    batch_size = s.batch_size or min(256, settings['batch_size'])
    metrics, predictions = evaluate(decoder, questions, tokens_of, device, batch_size, s.halt, writer=writer,
                                    **sampling)
    print(result_table(metrics))
    before = Path(s.out_dir) / 'metrics.json'
    known = json.loads(before.read_text()) if before.is_file() else {}
    usual = EvalConfig(out_dir=s.out_dir, batch_size=s.batch_size, device=s.device, graphs=s.graphs,
                       encoder=s.encoder, sound_encoder=s.sound_encoder)
    if rows.sum.hexdigest() == known.get('dataset_fingerprint', {}).get('test'):  # wherever they lie now
        usual.dataset = s.dataset
    if s != usual:
        print('nothing written: these are not the settings of the run itself')
    elif known.get('step') != checkpoint['run']['step'] or checkpoint['run']['step'] < settings['max_steps']:
        print('nothing written: the run is not finished; the command that began it goes on')
    else:  # the run's own test result
        first = rank_and_world()[0] == 0
        with locked(Path(s.out_dir) / '.lock') if first else nullcontext():
            write_results(s.out_dir, known | metrics, rows, predictions)
        print(f'written: {s.out_dir}/metrics.json, predictions.jsonl, samples.png')


if __name__ == '__main__':
    run_script(main)
