"""eval.py: metrics, retrieval, tables, pictures."""

import io
import itertools
import json
import random
import re
import sys
import types

import pytest
import torch
from PIL import Image

import eval as evaluation
from configurator import printable, write_whole
from eval import exact_match, normalize_answer, token_f1
from model import ModelConfig, build_model


@pytest.mark.parametrize('text, normal', [
    ('The  Cat!', 'cat'), ('a an the', ''), ('An apple a day', 'apple day'), ('theatre', 'theatre'), ('U.S.A.', 'usa'), ("it's", 'its'),
    ('the\u2014cat', '\u2014cat'), ('l\u2019a', 'l\u2019'), ('\u201ca\u201d dog', '\u201c \u201d dog'), ('x\u00a0y', 'x y'), ('', ''), ('A-B', 'ab')])
def test_normalize(text, normal):
    """SQuAD v2's order: lower case, ASCII punctuation away, articles as words away (Unicode punctuation bounds a word), space."""
    assert normalize_answer(text) == normal


@pytest.mark.parametrize('prediction, references, em, f1', [
    ('red', 'Red.', 1, 1), ('the red circle', ['blue', 'red circle'], 1, 1), ('a red circle', 'red square', 0, .5),
    ('red red', 'red', 0, 2 / 3), ('', '', 1, 1), ('', 'red', 0, 0), ('red', '', 0, 0), ('the', '', 1, 1), ('red', ['', 'red'], 1, 1),
    ('', ['', 'red'], 0, 0), ('big dog', ['small dog', 'big cat ran'], 0, .5), ('x', ['x y', 'x'], 1, 1)])
def test_metrics(prediction, references, em, f1):
    """EM and F1 are each the best over the references; empty references count only where there is no other (SQuAD v2)."""
    assert exact_match(prediction, references) == em and token_f1(prediction, references) == pytest.approx(f1)


def test_retrieval():
    """Perfect embeddings find each other, random ones do at chance; a prefix is judged on its own dimensions. Embeddings that are all alike, or no numbers, find
    nothing, and of pictures that are alike none is the right one for sure."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g)
    assert evaluation.retrieval(a, a, [8])[8]['R@1'] == 1
    mixed = torch.cat([a[:, :4], b[:, :4]], dim=1)
    result = evaluation.retrieval(a, mixed, [4, 8])
    assert result[4]['R@1'] == 1 > result[8]['R@1']
    assert evaluation.retrieval(a, b, [8])[8]['R@5'] < .3
    nan = torch.full((50, 8), torch.nan)
    assert evaluation.retrieval(a, nan, [8])[8] == {'R@1': 0, 'R@5': 0, 'R@10': 0, 'median rank': 50}
    for alike in (torch.ones(50, 8), nan):
        assert evaluation.retrieval(alike, alike, [8])[8]['R@10'] == 0
    twice = torch.cat([a, a[:10]])
    assert evaluation.retrieval(twice, twice, [8])[8]['R@1'] == pytest.approx(40 / 60) and evaluation.retrieval(twice, twice, [8])[8]['R@5'] == 1


def test_probe_reads_perfect_tokens():
    """On tokens that hold the scene itself the probe is nearly perfect; on noise it is not: it measures the tokens."""
    from prepare.shapes import COLORS, SHAPES, DrawnCaptions
    from prepare.shapes import Config as ShapesConfig

    class Oracle:
        def __init__(self, noise):
            self.noise, self.scenes = noise, []

        def normalise(self, pixels):
            return pixels

        def encode_images(self, pixels):
            tokens = torch.zeros(len(pixels), 6, 34)
            for i, scene in enumerate(self.scenes):
                for k, o in enumerate(scene):
                    tokens[i, k, list(COLORS).index(o['color']) * 4 + list(SHAPES).index(o['shape'])] = 1
                    tokens[i, k, 32:] = torch.tensor([o['x'], o['y']]) / 32 - 1
            return torch.randn(tokens.shape) if self.noise else tokens

    class Drawn(DrawnCaptions):
        def scenes(self, *args, **kwargs):
            result = super().scenes(*args, **kwargs)
            oracle.scenes = result[0]
            return result

    results = []
    for noise in (False, True):
        oracle = Oracle(noise)
        results.append(evaluation.probe(oracle, Drawn(ShapesConfig(), None), 'cpu', n_train=1000, n_test=250, steps=200))
    assert results[0]['pair_f1'] > .97 and results[0]['place_error_px'] < 4
    assert results[1]['pair_f1'] < .5 and results[1]['place_error_px'] > 10


def metrics(em, seed=0, **settings):
    """What a finished run has written. On '2 hops' it is right in em squared of the cases."""
    row = dict(n=10, em=em, f1=em, token_accuracy=.5, loss=1.)
    settings = dict(kind='plain', n_layer=4, inner_steps=3, outer_steps=2, recursion='add', batch_size=2, grad_accum=1, dataset='d', seed=seed) | settings
    return row | dict(em_types=(em + em ** 2) / 2, by_type={'color': row, '2 hops': row | dict(em=em ** 2), 'describe': row}, step=5, train_s=9., seed=seed,
                      parameters=dict(total=1234567, core=1000), settings=settings, mflop_per_example=3e6, curve=[(1, .5, .1), (2, 1., em)], commit='abc',
                      device='a cpu', threads=2, correct='1' * round(4 * em) + '0' * round(4 - 4 * em) + '-')


def test_seeds_on_two_devices(tmp_path):
    """Runs that differ in their seed and in where and how fast they ran belong together."""
    for k, seed in enumerate((1, 2)):
        (tmp_path / f'{seed}.json').write_text(json.dumps(metrics(.5, seed, device=f'cuda:{k}', compile=bool(k), wandb=bool(k), skip_bad_steps=k)))
    assert len(evaluation.grouped([tmp_path / '1.json', tmp_path / '2.json'])) == 1
    (tmp_path / '3.json').write_text(json.dumps(metrics(.5, 2, device='cuda:0')))
    assert [len(runs) for runs in evaluation.grouped([tmp_path / f'{k}.json' for k in (1, 2, 3)]).values()] == [2, 1]  # a seed counts once


def test_tables(tmp_path, capsys):
    """The result table has a line per type, captions last; --compare sets runs side by side and names a folder without results."""
    lines = evaluation.result_table(metrics(.25)).splitlines()
    assert [line.split('|')[0].strip() for line in lines[2:]] == ['color', '2 hops', 'all', 'mean of types', 'describe']
    for run, em in (('a', .25), ('b', .75)):
        (tmp_path / run).mkdir()
        (tmp_path / run / 'metrics.json').write_text(json.dumps(metrics(em, n_layer=round(4 * em))))
    table = evaluation.compare([tmp_path / 'a', tmp_path / 'b'])
    assert '0.250' in table and '0.750' in table and '1,234,567' in table and table.count(' | ') > 40
    with pytest.raises(FileNotFoundError, match='folders of finished runs'):
        evaluation.compare([tmp_path / 'c'])
    for name, text in dict(begun=None, align='{"probe": 1}').items():  # a pattern leaves out what is no finished run, and says so
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / 'metrics.json').write_text(text)
    capsys.readouterr()
    assert evaluation.compare([tmp_path / '*']).count('0.750') == table.count('0.750')
    assert [line.split(': ')[0] for line in capsys.readouterr().out.splitlines()] == ['left out'] * 4  # the two pictures are no runs either
    with pytest.raises(ValueError, match='align/metrics.json: no by_type'):
        evaluation.compare([tmp_path / 'align'])


def test_comparison(tmp_path, monkeypatch):
    """--compare puts the seeds of a configuration together: mean and Student's 95 % interval; the difference to the first one is seed by seed and question by
    question; --types and --reach say what is judged and when validation had it; patterns and copies of metrics.json are read too; the pictures are drawn, or a
    line says how to get them."""
    kinds = dict(plain=dict(kind='plain', n_layer=4), trm=dict(kind='trm', n_layer=2))
    for kind, ems in dict(plain=(.5, .5, .5), trm=(.5, .75, 1.)).items():
        for seed, em in enumerate(ems):
            newer = dict(objective='both') if seed == 2 else {}            # a setting that the other runs do not know yet
            m = metrics(em, seed, **kinds[kind], **newer, out_dir=f'{kind}_{seed}')
            (tmp_path / f'{kind}_{seed}.json').write_text(json.dumps(m))
    cells = lambda text: [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if '/plain' in line or '/trm' in line]
    text = evaluation.compare([tmp_path / 'plain_*', tmp_path / 'trm_*'], reach=.75)
    plain, trm, plain_scores, trm_scores = cells(text)
    half = 4.303 * .25 / 3 ** .5                                       # t at 2 degrees of freedom, standard deviation .25, 3 seeds
    near = lambda cell, mean, half: cell.startswith(f'{mean} ± ') and abs(float(cell.split()[-1]) - half) < 2e-3
    assert plain[0].endswith('/plain') and plain[1] == '3' and plain[4] == '4' and trm[4] == str(2 * 2 * (3 + 1))
    assert plain[6] == '30.0' and plain[8] == '0.375 ± 0.000' and trm[9] == '0.375 0.656 1.000' and near(trm[10], '+0.302', .7777)
    d = [0, 0, 2 / 3, 1 / 3]                                           # question by question: how much oftener the three seeds of trm are right
    sd = (sum((x - .25) ** 2 for x in d) / 4) ** .5
    assert trm[11] == f'+0.250 ± {1.96 * sd / 2:.3f}' and plain[10:] == ['-', '-', 'never, never, never'] and trm[12] == 'never, 2 (1 s), 2 (1 s)'
    assert near(trm_scores[1], '0.750', half) and trm_scores[3] == trm_scores[1] and trm_scores[4].startswith('0.604 ± ') and 'commit abc on a cpu' in text
    trm = cells(evaluation.compare([tmp_path / 'plain_*', tmp_path / 'trm_*'], judged=['2 hops']))[1]
    assert trm[9] == '0.250 0.562 1.000' and trm[10].startswith('+0.354 ± ')                     # the squares of trm less plain's .25
    with pytest.raises(ValueError, match='--types=size: .* has no such type; expected some of color, 2 hops'):
        evaluation.compare([tmp_path / 'plain_*'], judged=['size'])
    for name in ('comparison.png', 'comparison_curves.png'):
        assert Image.open(tmp_path / name).width > 600
    assert evaluation.labels(['r/swaps_n1_lr1e-3', 'r/swaps_n2_lr1e-3']) == ['n1', 'n2'] and evaluation.labels(['r/n1', 's/n1']) == ['n1', 'n1']
    assert evaluation.labels(['r/flops_n1', 'r/flops_n1_lr4e-3']) == ['n1', 'n1_lr4e-3'] and evaluation.labels(['r/trm_1']) == ['trm_1']
    this, that = metrics(.5), metrics(.75)
    assert evaluation.paired([this], [that]) and not evaluation.paired([this], [metrics(.75, dataset='e')])  # other questions
    assert not evaluation.paired([this], [that | dict(correct='1-110')])
    for k, kind in enumerate(('plain', 'trm') * 2):                        # two groups whose paths begin alike keep their runs and have two names
        (tmp_path / f'x_{k}.json').write_text(json.dumps(metrics(.5, k, kind=kind)))
    assert [len(runs) for runs in evaluation.grouped([tmp_path / 'x_*']).values()] == [2, 2]
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert evaluation.compare([tmp_path / 'plain_0.json']).count('plain') == 2


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('which', ['y', 'z'])
def test_forgetful(which, shared):
    """With --forget what the first step makes of that state reaches nothing, what it makes of the other one does; writing token by token agrees with reading it all."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=11, n_embd=16, n_head=2, vision_dim=3, inner_steps=2, outer_steps=2, shared=shared, deep_supervision=not shared))
    evaluation.forgetful(decoder, which)
    vision, question, watch = torch.randn(2, 4, 3), torch.randint(3, 11, (2, 5)), []
    answer = torch.tensor([[1, 7, 5], [1, 4, 9]])
    decoder.answer_states(decoder.read_context(vision, question), answer, watch=watch)  # the last cycle, steps three and four, has a gradient
    (third, _), (fourth, _) = watch[2:]
    y, z = torch.autograd.grad(fourth.pow(3).mean(), third)[0].chunk(2, dim=1)
    forgotten, kept = (y, z) if which == 'y' else (z, y)
    assert forgotten.abs().max() == 0 and kept.abs().max() > 0
    written = decoder.generate(vision, question, 3)
    read = decoder(vision, question, torch.cat([torch.ones(2, 1, dtype=torch.long), written[:, :-1]], dim=1))[0].argmax(-1)
    ends = (written == 2).int().cumsum(1) - (written == 2).int()           # after the end nothing is compared
    assert ((written == read) | (ends > 0)).all()


def test_write_whole(tmp_path):
    """A file whose writing fails stays as it was."""
    write_whole(tmp_path / 'x', lambda f: f.write(b'old'))
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / 'x', lambda f: f.write(b'half') / 0)
    assert (tmp_path / 'x').read_bytes() == b'old'


def test_bad_picture_is_named():
    """A picture that cannot be read when samples are drawn is named."""
    pictures = type('Pictures', (list,), dict(names=['a.png']))([b'rubbish'])
    with pytest.raises(ValueError, match='a.png: not a picture.*: remove or repair it'):
        evaluation.picture_of(types.SimpleNamespace(pictures=pictures, picture=[0]), 0)


def test_picture_sheet():
    """Long lines wrap inside their tile, control characters do not reach the picture, every tile is drawn."""
    tiles = [(Image.new('RGB', (64, 64), 'red'), ['a question ' * 12, 'bell\x07\x1b[31m'])] * 7
    sheet = evaluation.picture_sheet(tiles, columns=3)
    assert sheet.width < 700 and sheet.height > 3 * 64 * 3
    assert printable('a\x1b[31mb') == 'a [31mb'


@pytest.mark.parametrize('argv, message', [
    (['--image=x.png'], 'belong together'), (['--split=tset'], 'split=tset'), (['--forget=x'], 'expected y or z'), (['--reach=.5'], '--types and --reach go with --compare'), (['--out_dir=/nowhere'], 'no such file; a run writes it')])
def test_bad_arguments(argv, message):
    """A wrong combination or a folder without a run is one message."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluation.main(argv)


TEN = ['net'] * 3 + ['mesh'] + ['Netting'] * 6


@pytest.mark.parametrize('prediction, answers, score', [
    ('net', ['net'] * 4 + ['x'] * 6, 1), ('net', ['net'] * 3 + ['x'] * 7, .9), ('net', ['net'] * 2 + ['x'] * 8, .6), ('net', ['net'] + ['x'] * 9, .3),
    ('no', ['net'] * 9 + ['x'], 0), ('Yes', ['yes'] * 10, 0), ('yes', ['yes'] * 10, 1), ('Yes.', ['yes'] * 9 + ['no'], 1), ('none', ['0'] * 9 + ['no'], 1),
    ('two', ['2'] * 9 + ['3'], 1), ('the dog', ['dog'] * 9 + ['cat'], 1), ('dont', ["don't"] * 9 + ['do'], 1), ("couldnt've", ["couldn't've"] * 9 + ['x'], 1),
    ('red,blue', ['red blue'] * 9 + ['x'], 1), ('red, blue', ['red blue'] * 9 + ['x'], 1), ('1,000', ['1000'] * 9 + ['x'], 1), ('3.5', ['3.5'] * 9 + ['x'], 1),
    ('st. louis', ['st louis'] * 9 + ['x'], 1), ('5.', ['5'] * 9 + ['x'], 1), ("it's", ["it's"] * 9 + ['its'], 1), ('a\\tb\\n', ['b'] * 9 + ['x'], 0),
    ('a\tb\n', ['b'] * 9 + ['x'], 1), ('50%', ['50%'] * 9 + ['x'], 1), ('10:30', ['10:30'] * 9 + ['x'], 1)])
def test_vqa_accuracy(prediction, answers, score):
    """The official VQA v2 accuracy, with its quirks: 0, .3, .6, .9, 1 by how many agree; raw strings where all ten people agree."""
    assert evaluation.vqa_accuracy(prediction, answers) == pytest.approx(score)


def test_baselines(tmp_path, capsys):
    """The commonest answer, and the commonest to the same question, else to the same beginning, get what can be worked out by hand."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'PNG')
    train = [('is it red?', 'no')] * 3 + [('is it blue?', 'yes')] * 2 + [('what is it?', 'red')] * 4
    test = [('is it red?', ['no']), ('Is it blue?', ['yes']), ('is it green?', ['no']), ('how many?', ['3']), ('what is it?', ['a', 'red'])]
    for split, rows in (('train', [(q, [a]) for q, a in train]), ('test', test)):
        pq.write_table(pa.table(dict(image=[buffer.getvalue()] * len(rows), question=[q for q, _ in rows], answer=[a for _, a in rows])), tmp_path / f'{split}.parquet')
    for flag, score in (('--majority=true', '0.200'), ('--question_only=true', '0.800')):
        evaluation.main([f'--dataset={tmp_path}', flag])
        assert f'all          |      5 | {score}' in capsys.readouterr().out


def test_official_results(tmp_path, monkeypatch):
    """Of rows with ten answers and numbers for names, the predictions are written as VQA v2 wants them, and their soft accuracy is a column."""
    monkeypatch.setattr(evaluation, 'draw_samples', lambda *args: None)
    rows = types.SimpleNamespace(sample_id=['12', '7'], type=['other', 'other'], question=['q', 'q'], references=[['a'] * 3 + ['b'] * 7, ['yes'] * 10])
    predictions = [evaluation.scored(rows, i, text) for i, text in enumerate(('a.', 'yes'))]
    metrics = evaluation.summaries(predictions)
    assert metrics['equal'] == .5 and 'vqa' in evaluation.result_table(metrics).splitlines()[0]
    (tmp_path / 'log.jsonl').write_text('')
    evaluation.write_results(tmp_path, metrics, rows, predictions)
    assert json.loads((tmp_path / 'vqav2_results.json').read_text()) == [dict(question_id=12, answer='a.'), dict(question_id=7, answer='yes')]


def random_text(rng):
    parts = ['a', 'an', 'the', 'The', 'cat', 'dog', 'two', 'none', '1,000', '3.5', '.', ',', '!', '?', '-', '_', "'", "dont", "it's", ' ', '  ', '\t', '\n', '—', '“', '”', '…',
             'é', 'ß', '½', '\u200b', '\u00a0', '日本', '/', '(', ')', '$', '%', ':', '@', 'THEATRE', 'x y', 'İ', '٣,٤', '\x1c', '\u2028', "yall'd've", 'wont', 'twas', '5.', '...' * 12]
    return ''.join(rng.choice(parts) + rng.choice(['', '', ' ']) for _ in range(rng.randrange(9)))


def test_against_references_written_another_way():
    """On thousands of random strings, Unicode included, the metrics equal plain references to the last bit: words as runs of letters, digits and _, texts cleaned
    sign by sign, and people left out one by one."""
    def normalised(text):  # SQuAD v2
        runs = itertools.groupby((ch for ch in text.lower() if ch not in '!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~'), lambda ch: ch.isalnum() or ch == '_')
        return ' '.join(''.join(' ' if run in ('a', 'an', 'the') else run for run in (''.join(chars) for _, chars in runs)).split())

    def cleaned(text):  # VQA v2, sign by sign and point by point
        numbers = any(x.isdecimal() and comma == ',' and y.isdecimal() for x, comma, y in zip(text, text[1:], text[2:]))
        beside_space = lambda sign: any(pair in (sign + ' ', ' ' + sign) for pair in map(''.join, zip(text, text[1:])))
        gone = {sign: '' if numbers or beside_space(sign) else ' ' for sign in ';/[]"{}()=+\\_-><@`,?!'}
        signs, points, out = ''.join(gone.get(ch, ch) for ch in text), 0, ''
        for ch, after in zip(signs, signs[1:] + ' '):
            drop = ch == '.' and not after.isdecimal() and points < 32
            points, out = points + drop, out + ch * (not drop)
        words = [dict(none='0', two='2').get(word, word) for word in out.lower().split()]
        short = {"dont": "don't", "yall'd've": "y'all'd've", 'wont': "won't", 'twas': "'twas"}
        return ' '.join(short.get(word, word) for word in words if word not in ('a', 'an', 'the'))

    def leave_one_out(prediction, ten):
        prediction, *ten = (' '.join(re.split('[\n\t]', text)).strip() for text in (prediction, *ten))
        if len(set(ten)) > 1:
            prediction, *ten = map(cleaned, (prediction, *ten))
        people = list(enumerate(ten))
        return sum(min(1, float(sum(answer == prediction for other, answer in people if other != person)) / 3) for person, _ in people) / 10

    rng = random.Random(0)
    for _ in range(4000):
        a, b = random_text(rng), random_text(rng)
        assert normalize_answer(a) == normalised(a)
        if not normalised(b) or rng.random() < .5:
            b = a.upper() + rng.choice(['', '!', ' x'])
        p, g = normalised(a).split(), normalised(b).split()
        common = [p.count(w) if p.count(w) < g.count(w) else g.count(w) for w in set(p)]
        f1 = float(p == g) if not p or not g else 0 if not sum(common) else 2 * (sum(common) / len(p)) * (sum(common) / len(g)) / (sum(common) / len(p) + sum(common) / len(g))
        assert exact_match(a, b) == (normalised(a) == normalised(b)) and token_f1(a, b) == f1
        said = [random_text(rng), random_text(rng), a.upper()]
        ten = [rng.choice(said) for _ in range(10)] if rng.random() < .9 else said[:1] * 10
        prediction = rng.choice([*said, a, cleaned(said[0])])
        assert evaluation.vqa_accuracy(prediction, ten) == leave_one_out(prediction, ten)


def test_summaries():
    """Captions count for their own type alone; the mean over the types is over the others."""
    rows = [dict(type=type, em=em, f1=em, equal=em, tokens=2, hits=1, loss=3.) for type, em in (('color', 1.), ('count', 0.), ('count', 1.), ('describe', 0.))]
    m = evaluation.summaries(rows)
    assert m['em'] == 2 / 3 and m['n'] == 3 and m['em_types'] == .75 and m['by_type']['describe']['em'] == 0 and m['loss'] == 1.5 and list(m['by_type']) == ['color', 'count', 'describe']
    alone = evaluation.summaries(rows[3:])
    assert alone['em_types'] == alone['em'] == 0 and alone['n'] == 1
