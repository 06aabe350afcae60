"""eval.py: metrics, tables, pictures."""

import itertools
import json
import random
import re
import types

import pytest
import torch
from PIL import Image

import eval as evaluation
from eval import exact_match, normalize_answer, token_f1
from plumbing import results
from plumbing.console import printable
from plumbing.files import write_whole
from plumbing.pictures import picture_sheet
from prepare.vqav2 import vqa_accuracy


@pytest.mark.parametrize('text, normal', [
    ('The  Cat!', 'cat'), ('a an the', ''), ('An apple a day', 'apple day'), ('theatre', 'theatre'), ('U.S.A.', 'usa'), ("it's", 'its'),
    ('the\u2014cat', '\u2014cat'), ('l\u2019a', 'l\u2019'), ('\u201ca\u201d dog', '\u201c \u201d dog'), ('x\u00a0y', 'x y'), ('', ''), ('A-B', 'ab')])
def test_normalize(text, normal):
    """SQuAD v2's order: lower case, ASCII punctuation away, articles as words away (Unicode punctuation bounds a word), space."""
    assert normalize_answer(text) == normal


@pytest.mark.parametrize('prediction, references, em, f1', [
    ('red', 'Red.', 1, 1), ('the red circle', ['blue', 'red circle'], 1, 1), ('a red circle', 'red square', 0, .5),
    ('red red', 'red', 0, 2 / 3), ('', '', 1, 1), ('', 'red', 0, 0), ('red', '', 0, 0), ('the', '', 0, 0), ('red', ['', 'red'], 1, 1),
    ('', ['', 'red'], 0, 0), ('big dog', ['small dog', 'big cat ran'], 0, .5), ('x', ['x y', 'x'], 1, 1)])
def test_metrics(prediction, references, em, f1):
    """EM and F1 are each the best over the references; empty references count only where there is no other (SQuAD v2)."""
    assert exact_match(prediction, references) == em and token_f1(prediction, references) == pytest.approx(f1)


@pytest.mark.parametrize('prediction, reference, em', [('+', '+', 1), ('+', '-', 0), ('<', '>', 0), ('!', '?', 0), (' + ', '+', 1), ('', '+', 0), ('...', 'red', 0), ('the', 'a', 0), ('+', ['-', '+'], 1),
    ('A', ['A', 'B'], 1), ('a', 'A.', 1), ('A', ['A'] * 9 + ['b'], 1), ('', 'A', 0), ('B', 'A', 0), ('a cat', 'cat', 1)])
def test_signs(prediction, reference, em):
    """An answer of signs or articles alone is compared as it is: normalised, all of them were equal, or worth nothing."""
    assert exact_match(prediction, reference) == em == token_f1(prediction, reference)


def test_merged_answers():
    """Answers that only normalisation makes equal are named under the table, and beside em stands what is equal without it; end marks, case and articles are no difference."""
    rows = types.SimpleNamespace(sample_id=list('abcde'), type=['t'] * 5, question=['q'] * 5, references=[['-5'], ['5'], ['C++'], ['C'], ['the sea.', 'Sea']])
    merged = evaluation.summaries([evaluation.scored(rows, i, '5') for i in range(5)])
    table = results.result_table(merged)
    assert merged['merged'] == ['5 = -5', 'c = c++'] and merged['em'] == .4 and merged['equal'] == .2
    assert '5 = -5; c = c++' in table and '| 0.400 | 0.200 |' in table
    alone = evaluation.summaries([evaluation.scored(rows, i, '5') for i in (1, 3, 4)])
    assert alone['merged'] == [] and 'equal' not in results.result_table(alone)


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
        results.picture_of(types.SimpleNamespace(pictures=pictures, picture=[0]), 0)


def test_picture_sheet():
    """Long lines wrap inside their tile, control characters do not reach the picture, every tile is drawn."""
    tiles = [(Image.new('RGB', (64, 64), 'red'), ['a question ' * 12, 'bell\x07\x1b[31m'])] * 7
    sheet = picture_sheet(tiles, columns=3)
    assert sheet.width < 700 and sheet.height > 3 * 64 * 3
    assert printable('a\x1b[31mb') == 'a [31mb'


@pytest.mark.parametrize('argv, message', [
    (['--question=q'], 'about what'), (['--split=tset'], 'split=tset'), (['--image=', '--question=q'], '--image is empty'), (['--out_dir=/nowhere'], 'no such file; a run writes it')])
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
    assert vqa_accuracy(prediction, answers) == pytest.approx(score)


def test_official_results(tmp_path, monkeypatch):
    """Of rows with ten answers and numbers for names, the predictions are written as VQA v2 wants them, and their soft accuracy is a column."""
    monkeypatch.setattr(results, 'draw_samples', lambda *args: None)
    rows = types.SimpleNamespace(sample_id=['12', '7'], type=['other', 'other'], question=['q', 'q'], references=[['a'] * 3 + ['b'] * 7, ['yes'] * 10])
    predictions = [evaluation.scored(rows, i, text) for i, text in enumerate(('a.', 'yes'))]
    metrics = evaluation.summaries(predictions)
    assert metrics['equal'] == .5 and 'vqa' in results.result_table(metrics).splitlines()[0]
    (tmp_path / 'log.jsonl').write_text('')
    results.write_results(tmp_path, metrics, rows, predictions)
    assert json.loads((tmp_path / 'vqav2_results.json').read_text()) == [dict(question_id=12, answer='a.'), dict(question_id=7, answer='yes')]


def random_text(rng):
    parts = ['a', 'an', 'the', 'The', 'cat', 'dog', 'two', 'none', '1,000', '3.5', '.', ',', '!', '?', '-', '_', "'", "dont", "it's", ' ', '  ', '\t', '\n', '—', '“', '”', '…',
             'é', 'ß', '½', '\u200b', '\u00a0', '日本', '/', '(', ')', '$', '%', ':', '@', 'THEATRE', 'x y', 'İ', '٣,٤', '\x1c', '\u2028', "yall'd've", 'wont', 'twas', '5.', '...' * 12]
    return ''.join(rng.choice(parts) + rng.choice(['', '', ' ']) for _ in range(rng.randrange(9)))


def test_against_references_written_another_way():
    """On thousands of random strings, Unicode included, the metrics equal plain references to the last bit: words as runs of letters, digits and _, texts cleaned
    sign by sign, and people left out one by one."""
    def without_articles(text):
        runs = itertools.groupby(text.lower(), lambda ch: ch.isalnum() or ch == '_')
        return ' '.join(''.join(' ' if run in ('a', 'an', 'the') else run for run in (''.join(chars) for _, chars in runs)).split())

    def normalised(text):  # SQuAD v2
        return without_articles(''.join(ch for ch in text.lower() if ch not in '!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~'))

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
        bare = [''.join(ch for ch in text.lower() if ch not in '!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~').split() for text in (a, b)]
        shown = [normalised(text) or ' '.join(words) or ' '.join(text.lower().split()) for text, words in zip((a, b), bare)]  # what would be empty stays
        p, g = (text.split() for text in shown)
        common = [p.count(w) if p.count(w) < g.count(w) else g.count(w) for w in set(p)]
        f1 = float(p == g) if not p or not g else 0 if not sum(common) else 2 * (sum(common) / len(p)) * (sum(common) / len(g)) / (sum(common) / len(p) + sum(common) / len(g))
        assert exact_match(a, b) == (shown[0] == shown[1]) and token_f1(a, b) == f1
        said = [random_text(rng), random_text(rng), a.upper()]
        ten = [rng.choice(said) for _ in range(10)] if rng.random() < .9 else said[:1] * 10
        prediction = rng.choice([*said, a, cleaned(said[0])])
        assert vqa_accuracy(prediction, ten) == leave_one_out(prediction, ten)


def test_summaries():
    """Captions count for their own type alone; the mean over the types is over the others."""
    rows = [dict(type=type, em=em, f1=em, equal=em, tokens=2, hits=1, loss=3., references=['a']) for type, em in (('color', 1.), ('count', 0.), ('count', 1.), ('describe', 0.))]
    m = evaluation.summaries(rows)
    assert m['em'] == 2 / 3 and m['n'] == 3 and m['em_types'] == .75 and m['by_type']['describe']['em'] == 0 and m['loss'] == 1.5 and list(m['by_type']) == ['color', 'count', 'describe']
    alone = evaluation.summaries(rows[3:])
    assert alone['em_types'] == alone['em'] == 0 and alone['n'] == 1


def test_result_table():
    """The result table has a line per type, captions last."""
    row = dict(n=10, em=.5, f1=.5, token_accuracy=.5, loss=1.)
    lines = results.result_table(row | dict(em_types=.5, by_type={'color': row, '2 hops': row, 'describe': row})).splitlines()
    assert [line.split('|')[0].strip() for line in lines[2:]] == ['color', '2 hops', 'all', 'mean of types', 'describe']


@pytest.mark.parametrize('spoil, message', [
    (lambda c: c['model_config'].update(shared=True), 'no setting shared'), (lambda c: c['model_config'].update(norm='unbounded'), 'norm=unbounded: expected one of pre, post'),
    (lambda c: c['run']['best']['decoder'].pop('z_start'), 'other weights z_start'), (lambda c: c['run']['best']['decoder'].update(gate=torch.ones(1)), 'other weights gate')])
def test_a_checkpoint_that_does_not_fit(spoil, message):
    """What of a run the code does not know is named in one line, with the commit that made it."""
    import dataclasses

    from model import ModelConfig, build_model
    config = ModelConfig(n_embd=16, n_head=2, vision_dim=4, use_vision=False)
    checkpoint = dict(stage='answer', settings=dict(out_dir='out/x', use_vision=False), model_config=dataclasses.asdict(config), environment=dict(commit='abc123'),
                      run=dict(best=dict(decoder=build_model(config).state_dict())), tokenizer=dict(name='bpe', tokens=[bytes([b]).hex() for b in range(256)]))
    assert evaluation.load_run(checkpoint, 'cpu')[0].config.qk_norm
    checkpoint['model_config'].pop('qk_norm')  # of a run from before that setting
    assert not evaluation.load_run(checkpoint, 'cpu')[0].config.qk_norm
    spoil(checkpoint)
    with pytest.raises(ValueError, match=f'out/x: its decoder does not fit this code .{message}.*; commit abc123 made the run'):
        evaluation.load_run(checkpoint, 'cpu')
