"""data.py: the drawn pictures and their questions, datasets on disk, the tokenizer, batches."""

import hashlib
import io
import json
import math
import random
import re
import runpy
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import prepare
from data import Questions, Tokenizer, read_rows, train_bpe
from plumbing.tables import SPLITS, write_dataset
from prepare import shapes, wild
from prepare._looks import ALSO, COLORS, draw_plain, draw_varied
from prepare.shapes import Config as ShapesConfig


@pytest.fixture(scope='module')
def many_rows():
    return shapes.shapes_rows(ShapesConfig(types=','.join([*shapes.ASK, 'hops'])), 'train', 0, 250)


def scene_of(i, config=ShapesConfig()):
    return shapes.draw_scene(random.Random(i), config)


def test_scenes():
    """Objects have unique (colour, shape) pairs, lie inside the picture and do not touch; twelve fit into 64 pixels."""
    for i in range(50):
        scene = scene_of(i, ShapesConfig(max_objects=12))
        assert len({(o['color'], o['shape']) for o in scene}) == len(scene) >= 2
        for k, a in enumerate(scene):
            assert all(a['r'] < a[axis] < 64 - a['r'] for axis in 'xy')
            assert all(math.hypot(a['x'] - b['x'], a['y'] - b['y']) > a['r'] + b['r'] for b in scene[:k])
    with pytest.raises(ValueError, match='do not fit'):
        scene_of(0, ShapesConfig(image_px=32, min_objects=20, max_objects=20))


def test_pictures_show_the_scene():
    """The pixel at an object's centre has the object's colour, a corner of the picture has none."""
    for i in range(20):
        scene = scene_of(i)
        pixels = np.array(draw_plain(scene, random.Random(i), 64)).astype(int)
        assert pixels.shape == (64, 64, 3)
        for o in scene:
            color = pixels[int(o['y']), int(o['x'])]
            nearest = min(shapes.COLORS, key=lambda c: abs(color - shapes.COLORS[c]).sum())
            assert nearest == o['color']


def stands_out(scene, picture):
    """Whether the middle of every object has a colour that goes by its name, and another one than the corner nearest to it."""
    pixels = np.array(picture.convert('RGB').resize((256, 256), Image.BOX)).astype(int)
    for o in scene:
        x, y = int(4 * o['x']), int(4 * o['y'])
        color = pixels[y - 1:y + 2, x - 1:x + 2].mean((0, 1))
        corner = pixels[-3 if y > 128 else 3, -3 if x > 128 else 3]
        names = {name: min(np.abs(color - rgb).sum() for rgb in (COLORS[name], *ALSO[name])) for name in COLORS}
        # a blend of two names of a colour is one of its names too
        if names[o['color']] > min(names.values()) + 60 or np.abs(color - corner).sum() < 40:
            return False
    return True


def test_variety():
    """Varied scenes have both sizes, in the proportion of plain ones, at about half to three times theirs; their pictures have 48 to
    512 pixels and show the scene; a share of the training pictures is varied, and none of the others."""
    scales, sides, seen = [], [], []
    for i in range(150):
        rng = random.Random(i)
        scene = shapes.draw_scene(rng, ShapesConfig(), varied=True)
        picture = draw_varied(scene, rng, 64)
        assert {o['size'] for o in scene} == {'small', 'big'}
        r = {o['size']: o['r'] for o in scene}
        assert math.isclose(r['big'] / r['small'], 7.5 / 4.5)
        scales.append(r['big'] / 7.5)
        sides.append(picture.width)
        seen.append(stands_out(scene, picture))
    assert .55 <= min(scales) < .7 and 2.2 < max(scales) <= 3 and 48 <= min(sides) < 60 and 350 < max(sides) <= 512
    assert np.mean(seen) > .97, np.mean(seen)
    for variety, split, share in ((1, 'train', 1), (.5, 'train', .5), (0, 'train', 0), (1, 'val', 0), (1, 'test', 0)):
        files = {row['image'] for row in shapes.shapes_rows(ShapesConfig(variety=variety), split, 0, 60)}
        varied = [Image.open(io.BytesIO(file)).size != (64, 64) for file in files]
        assert abs(np.mean(varied) - share) < .2 and (share not in (0, 1) or np.mean(varied) > share - .1)
    assert {Image.open(io.BytesIO(f)).format for f in {row['image'] for row in shapes.shapes_rows(ShapesConfig(variety=1), 'train', 0, 20)}} == {'JPEG', 'PNG'}


def test_plain_pictures_stay_as_they_were():
    """Without variety the pictures and questions are those that results/ was measured on, byte for byte."""
    rows = shapes.shapes_rows(ShapesConfig(variety=0, describe=.1, asked=1, types='color,shape,exist,count,compare,relation,hops'), 'train', 0, 200)
    told = hashlib.sha256(''.join(f"{row['sample_id']} {row['question']} {row['answer']} {row['caption']}" for row in rows).encode())
    pixels = hashlib.sha256()
    for file in dict.fromkeys(row['image'] for row in rows):
        pixels.update(Image.open(io.BytesIO(file)).tobytes())
    assert (told.hexdigest()[:16], pixels.hexdigest()[:16]) == ('afeaccee46c5b3ba', '565c2c16aaf3d86e')


def test_wild(tmp_path, monkeypatch):
    """Wild pictures show their scenes, drawn by another program for each split; none are to train on; matplotlib is asked for where it is missing."""
    monkeypatch.chdir(tmp_path)
    data.main(['wild', '--show=true'])
    assert Image.open('wild.png').size > (600, 600)
    data.main(['wild', f'--out={tmp_path}/wild', '--n_val=12', '--n_test=12'])
    val, test = (read_rows(tmp_path / 'wild', split) for split in ('val', 'test'))
    assert len(read_rows(tmp_path / 'wild', 'train')) == 0 and len(val.pictures) == len(test.pictures) == 12
    assert not set(val.pictures.digests) & set(test.pictures.digests) and {'color', 'count', 'relation'} <= set(val.type)
    for split in ('wild val', 'wild test'):
        seen = []
        for i in range(40):
            scene, file = wild.draw_wild(random.Random(i), ShapesConfig(), split)
            seen.append(stands_out(scene, Image.open(io.BytesIO(file))))
        assert np.mean(seen) > .9, (split, np.mean(seen))
    monkeypatch.setattr(wild, 'matplotlib', None)
    with pytest.raises(ValueError, match='pip install matplotlib'):
        wild.Config()


def answer_by_looking(question, scene):
    """A second, independent solver: works on the words of the question and the coordinates."""
    def is_(o, words):
        words = words.replace('crosses', 'cross').replace(' objects', '').replace(' object', '')
        return all(w.rstrip('s') in (o['color'], o['shape'].rstrip('s'), o['size']) or w in (o['color'], o['shape'], o['size'])
                   for w in words.split())

    def beside(side, anchor):
        dx, dy = lambda o: o['x'] - anchor['x'], lambda o: o['y'] - anchor['y']
        test = {'left of': lambda o: -dx(o) > abs(dy(o)), 'right of': lambda o: dx(o) > abs(dy(o)),
                'above': lambda o: -dy(o) > abs(dx(o)), 'below': lambda o: dy(o) > abs(dx(o))}[side]
        return [o for o in scene if o is not anchor and test(o)]

    def find(phrase):  # "the object left of the object above the red circle" or "the red circle"
        if m := re.fullmatch(r'the object (left of|right of|above|below) (the .*)', phrase):
            found = beside(m[1], find(m[2]))
        else:
            found = [o for o in scene if is_(o, phrase.removeprefix('the '))]
        assert len(found) == 1, (phrase, found)
        return found[0]

    count = lambda words: sum(is_(o, words) for o in scene)
    if m := re.fullmatch(r'(?:swap (.*): )?what color is number (\d)\?', question):  # backwards, from the place asked for
        place = m[2]
        for pair in reversed(m[1].split(', ') if m[1] else []):
            place = pair.replace(place, '').strip() if place in pair else place
        return sorted(scene, key=lambda o: o['x'])[int(place) - 1]['color']
    if m := re.fullmatch(r'what (color|shape) is (.*)\?', question):
        return find(m[2])[m[1]]
    if m := re.fullmatch(r'is there a (.*)\?', question):
        return 'yes' if count(m[1]) else 'no'
    if m := re.fullmatch(r'how many (.*) are there\?', question):
        return str(count(m[1]))
    if m := re.fullmatch(r'are there more (.*) than (.*)\?', question):
        return 'yes' if count(m[1]) > count(m[2]) else 'no'
    m = re.fullmatch(r'is (the .*?) (left of|right of|above|below) (the .*)\?', question)
    assert m, f'the second solver knows no such question, teach it: {question}'
    return 'yes' if find(m[1]) in beside(m[2], find(m[3])) else 'no'


@pytest.mark.parametrize('n', [5, 7])
def test_answers_are_true(n):
    """A second solver that reads the words agrees with every question that a scene allows, of every type, up to three hops and four swaps."""
    config = ShapesConfig(min_objects=n, max_objects=n)
    asked = Counter()
    for i in range(300):
        scene = scene_of(i, config)
        for type, ask in shapes.ASK.items():
            for question, answer in random.Random(i).sample(ask(scene), min(4, len(ask(scene)))):
                assert answer_by_looking(question, scene) == answer, (question, scene)
                asked[type] += 1
        for hops in (1, 2, 3):
            for question, answer in shapes.ask_hops(scene, hops)[:6]:
                assert answer_by_looking(question, scene) == answer, (question, scene)
                asked[shapes.plural(hops, 'hop')] += 1
        for swaps in range(5):
            for question, answer in shapes.ask_swaps(scene, swaps)[:6]:
                assert answer_by_looking(question, scene) == answer, (question, scene)
                asked[shapes.plural(swaps, 'swap')] += 1
    assert set(asked) == {*shapes.ASK, '1 hop', '2 hops', '3 hops', '0 swaps', '1 swap', '2 swaps', '3 swaps', '4 swaps'}


def test_shortcut_of_hops():
    """Most chains to *the only* object on a side need no following: their words without the start leave one answer. The README says so."""
    for hops, least in ((1, .85), (2, .95)):
        told, n = 0, 0
        for i in range(300):
            answers = {}
            for question, answer in shapes.ask_hops(scene_of(i), hops):
                answers.setdefault(re.sub(r'the \w+ \w+\?$', '', question), []).append(answer)
            told, n = told + sum(len(a) for a in answers.values() if len(set(a)) == 1), n + sum(map(len, answers.values()))
        print(f'{shapes.plural(hops, "hop")}: {told / n:.2f} of the questions are answered without their start')
        assert told / n >= least


def test_swaps_have_no_shortcut():
    """Whoever overlooks one swap, whichever it is, is right in half of the cases: when it did not touch the place (or, of one, when it is not the asked one)."""
    config = ShapesConfig(types='swaps', min_objects=4, max_objects=4, max_swaps=6, train_swaps=2, describe=0, asked=1)
    for swaps in range(1, 7):
        right, n = Counter(), 0
        for i in range(300):
            scene = scene_of(i, config)
            assert len({o['color'] for o in scene}) == 4
            for question, answer in shapes.ask_swaps(scene, swaps):
                pairs, asked, n = re.findall(r'\d \d', question), question.split('what')[1], n + 1
                assert len(pairs) == swaps and all({*a} != {*b} for a, b in zip(pairs, pairs[1:]))
                for k in range(swaps):
                    others = ', '.join(pairs[:k] + pairs[k + 1:])
                    right[k] += answer_by_looking(f"{f'swap {others}: ' if others else ''}what{asked}", scene) == answer
        print(f'{shapes.plural(swaps, "swap")}: right without one of them, first to last:', *(f'{right[k] / n:.2f}' for k in range(swaps)))
        assert all(.4 < right[k] / n < .6 for k in range(swaps))
    types = [Counter(r['type'] for r in shapes.shapes_rows(config, split, 0, 20)) for split in ('train', 'test')]
    assert types[0] == {'0 swaps': 40, '1 swap': 40, '2 swaps': 40} and set(types[1]) == set(types[0]) | {f'{k} swaps' for k in (3, 4, 5, 6)}
    for bad, named in ((dict(types='color,hop'), 'types'), (dict(types='color,swaps'), 'types'), (dict(train_swaps=5), 'train_swaps'), (dict(types='swaps'), 'min_objects')):
        with pytest.raises(ValueError, match=f'^{named}='):
            ShapesConfig(**bad)


def test_answers_are_balanced(many_rows):
    """Within a type no answer is much more frequent than another: a blind guess gains little."""
    bounds = dict(color=.16, shape=.28, exist=.52, count=.27, compare=.55, relation=.52)
    assert bounds.keys() == shapes.ASK.keys(), 'a new type needs its bound here'
    for type, most in bounds.items():
        counts = Counter(r['answer'] for r in many_rows if r['type'] == type)
        assert max(counts.values()) / sum(counts.values()) <= most, (type, counts)
    absent = [r for r in many_rows if r['type'] == 'exist' and r['answer'] == 'no']
    assert len(absent) > 100  # "absent" pairs are of a colour and a shape that are there: checked by the second solver


def test_types_and_captions(many_rows):
    """The number of hops is the row's type; about six tenths of the pictures ask for their caption."""
    types = Counter(r['type'] for r in many_rows)
    assert min(types[type] for type in ('1 hop', '2 hops')) > 100
    captions = [r for r in many_rows if r['type'] == 'describe']
    assert 120 < len(captions) < 180 and all(r['question'] is None for r in captions)
    assert re.match(r'a (small|big) \w+ \w+(, a|  and a| and a)', captions[0]['caption'])
    asked = dict(types='color,relation,relation,hops', min_objects=6)
    numbers = [Counter(r['type'] for r in shapes.shapes_rows(ShapesConfig(**asked, asked=n), split, 0, 40)) for n, split in ((1, 'train'), (2, 'train'), (2, 'val'))]
    assert [n['relation'] for n in numbers] == [80, 160, 40] and numbers[1]['1 hop'] > 1.8 * numbers[0]['1 hop'] > 0 and numbers[2]['1 hop'] <= 40, numbers
    questions = Counter((r['image'], r['question']) for r in many_rows if r['question'])
    assert max(questions.values()) == 1  # none twice about the same picture


def test_shapes_are_a_function_of_the_seed(tiny_shapes, tmp_path):
    """The same seed draws the same rows, another one does not; splits share no picture."""
    a, b, c = (shapes.shapes_rows(ShapesConfig(seed=s), 'train', 0, 5) for s in (1, 1, 2))
    assert a == b != c
    pictures = [set(read_rows(tiny_shapes, split).pictures.digests) for split in SPLITS]
    assert len(set.union(*pictures)) == sum(map(len, pictures)) == 100


# ---- datasets on disk

def png(color=(9, 9, 9), size=(8, 8)):
    buffer = io.BytesIO()
    Image.new('RGB', size, color).save(buffer, 'PNG')
    return buffer.getvalue()


def write(folder, split='train', **columns):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f'{split}.parquet')
    return folder


def test_columns(tmp_path):
    """Images may be bytes, a struct or a path; answers a string or a list; a caption makes a question; a picture is kept once."""
    folder = write(tmp_path / 'a', image=[{'path': None, 'bytes': png()}, {'path': 'p.png', 'bytes': None}],
                   question=['what?', 'where?'], answer=[['a', 'b'], ['c']])
    (folder / 'p.png').write_bytes(png((200, 0, 0)))
    rows = read_rows(folder, 'train')
    assert list(rows.references) == [['a', 'b'], ['c']] and len(rows.pictures) == 2 and list(rows.type) == ['all', 'all']
    rows = read_rows(write(tmp_path / 'b', image=[png(), png(), png((1, 1, 1))], caption=['a dog', 'a cat', 'a cow']), 'train')
    assert list(rows.references) == [['a dog'], ['a cat'], ['a cow']] and list(rows.picture) == [0, 0, 1]
    assert all(q in data.PROMPTS for q in rows.question) and list(rows.type) == ['describe'] * 3
    assert list(rows.caption) == list(rows.captions) == ['a dog', 'a cow']  # from the first ones alone stage 1 learns its words
    rows = read_rows(write(tmp_path / 'c', image=[png()], caption=[['a dog', 'a pet']]), 'train')
    assert list(rows.references) == [['a dog', 'a pet']] and list(rows.caption) == ['a dog']


@pytest.mark.parametrize('columns, message', [
    (dict(image=[png()], text=['x']), 'has no column question or caption; it has image, text'),
    (dict(question=['x'], answer=['y']), 'has no column image'),
    (dict(image=[png()] * 3, question=['q', 'q', ' '], answer=['a', '', 'a']), '2 of 3 rows cannot be used: row 1: the answer is empty'),
    (dict(image=[b''], question=['q'], answer=['a']), 'row 0: the image is empty'),
    (dict(image=['../secret.png'], question=['q'], answer=['a']), "row 0: the image path '../secret.png' leaves the folder"),
    (dict(image=['no.png'], question=['q'], answer=['a']), 'there is no image file:'),
    (dict(image=[png()], question=['q'], answer=pa.array([None], pa.string())), 'the answer is empty or no text'),
    (dict(image=[png()], question=[3], answer=['a']), 'the question is no text'),
    (dict(image=[['a.png']], question=['q'], answer=['a']), 'row 0: the image is a list, expected bytes or a path'),
    (dict(image=[png()], question=['q'], answer=['a'], caption=[3]), 'the caption is no text')])
def test_bad_rows(tmp_path, columns, message):
    """Bad columns and bad rows are counted and named with file, row, reason and remedy, never skipped."""
    with pytest.raises(ValueError) as error:
        read_rows(write(tmp_path / 'a', **columns), 'train')
    assert message in str(error.value) and 'train.parquet' in str(error.value)


def test_missing_and_torn_files(tmp_path):
    """A missing dataset and a file that is no parquet are one message each."""
    with pytest.raises(FileNotFoundError, match='no such file; a dataset is a folder'):
        read_rows(tmp_path / 'none', 'train')
    (tmp_path / 'train.parquet').write_bytes(b'hello')
    with pytest.raises(ValueError, match='not a parquet file'):
        read_rows(tmp_path, 'train')


@pytest.mark.parametrize('out, message', [('.', 'expected the name of a new folder'), ('/', 'expected the name of a new folder'), ('..', 'expected the name of a new folder'),
                                          ('', 'expected the name of a new folder'), ('{tmp}/file', 'already there, a file'), ('{tmp}/file/x', 'is to be a new folder'), ('{tmp}', 'already there; delete it')])
def test_folders_to_write(tmp_path, out, message):
    """An --out that is no new folder says what was expected, before anything is read."""
    (tmp_path / 'file').write_text('mine')
    with pytest.raises((ValueError, FileExistsError), match=message):
        write_dataset(out.format(tmp=tmp_path), [('train', None)])
    assert (tmp_path / 'file').read_text() == 'mine'


def test_what_is_true_of_a_stopped_import(tmp_path, monkeypatch, capsys):
    """Ctrl-C in an import does not claim that what is finished is kept: training alone keeps it."""
    def stopped(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, 'import_dataset', stopped)
    monkeypatch.setattr(sys, 'argv', ['data.py', 'easyvqa', '--source=x', f"--out={tmp_path / 'x'}"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / 'data.py'), run_name='__main__')
    assert capsys.readouterr().err.startswith('stopped; nothing was written, and the same command starts over')


def test_long_texts(tmp_path):
    """A text of more than 100,000 signs is a bad row: gpt2's pattern breaks down at a million spaces."""
    for column in ('question', 'answer', 'caption'):
        row = dict(question='q', answer='a', caption='c') | {column: ' ' * 10 ** 6 + 'x'}
        with pytest.raises(ValueError, match='row 0: a text has more than 100000 signs: 1000001'):
            read_rows(write(tmp_path / column, image=[png()], **{key: [text] for key, text in row.items()}), 'train')
    assert len(read_rows(write(tmp_path / 'a', image=[png()], question=['x' * 10 ** 5], answer=['a']), 'train')) == 1


def test_datasets_appear_whole(tmp_path):
    """A dataset that fails half way leaves nothing under its name, and one that exists is not overwritten."""
    def rows():
        yield 'train', dict(image=b'x', question='q', answer='a')
        raise RuntimeError('killed')
    with pytest.raises(RuntimeError):
        write_dataset(tmp_path / 'd', rows())
    assert not (tmp_path / 'd').exists()
    (tmp_path / 'd').mkdir()
    with pytest.raises(FileExistsError, match='already there'):
        write_dataset(tmp_path / 'd', [])


def test_easyvqa(tmp_path):
    """The easy-VQA importer keeps its test split, divides train by picture, and types yes/no and open questions apart."""
    for part, n in (('train', 60), ('test', 5)):
        (tmp_path / 'src' / part / 'images').mkdir(parents=True)
        triples = [[q, a, i] for i in range(n) for q, a in (('is there a circle?', 'yes'), ('what color is it?', 'red'))]
        (tmp_path / 'src' / part / 'questions.json').write_text(json.dumps(triples))
        for i in range(n):
            (tmp_path / 'src' / part / 'images' / f'{i}.png').write_bytes(png((i, n, 0)))
    data.main(['easyvqa', f"--source={tmp_path / 'src'}", f"--out={tmp_path / 'out'}"])
    train, val, test = (read_rows(tmp_path / 'out', split) for split in SPLITS)
    assert len(train) + len(val) == 120 and len(test) == 10 and 2 <= len(val) <= 30
    for part, rows in (('train', train), ('train', val), ('test', test)):
        for name, question, references, k in zip(rows.sample_id, rows.question, rows.references, rows.picture):
            image, n = map(int, name.split('-')[1:])
            assert rows.pictures[k] == (tmp_path / f'src/{part}/images/{image}.png').read_bytes()
            assert (question, references) == (('is there a circle?', ['yes']), ('what color is it?', ['red']))[n % 2]
    assert not set(train.pictures.digests) & set(val.pictures.digests) and set(test.type) == {'yes/no', 'open'}


def test_command_line(tmp_path, capsys, monkeypatch):
    """data.py draws a contact sheet and a dataset, prints its page without arguments, and refuses an unknown format."""
    monkeypatch.chdir(tmp_path)
    data.main(['shapes', '--show=true'])
    assert Image.open('shapes.png').size > (600, 600)
    data.main([])
    assert 'formats: captions, clevr, daquar, easyvqa' in capsys.readouterr().out
    with pytest.raises(ValueError, match='no such format; there are captions, clevr, daquar, easyvqa'):
        data.main(['vqa9'])
    with pytest.raises(ValueError, match='--source is needed'):
        data.main(['easyvqa', '--out=x'])


# ---- tokenizer

def test_tokenizer_round_trip():
    """Any text comes back, specials cannot be typed, and training is deterministic and merges what is frequent."""
    texts = ['what color is the circle?', 'a big red circle and a small blue square'] * 5
    state = train_bpe(texts, 300)
    assert state == train_bpe(texts, 300)
    t = Tokenizer(state)
    assert t.vocab_size <= 300 and len(t.encode(' circle')) == 1
    for text in ('What colour?', 'naïve — “quotes” 日本語 🙂', '<pad><bos><eos>', 'a  b\tc\n', '__x__ 12345'):
        ids = t.encode(text)
        assert t.bpe.decode(ids) == text and max(ids) < t.pad_id
    for start in range(0, 0x110000, 256):  # every character
        text = ''.join(chr(c) for c in range(start, start + 256) if not 0xd800 <= c < 0xe000)
        assert t.bpe.decode_bytes(t.encode(text)) == text.encode()
    assert state == train_bpe(texts[::-1], 300) and {bytes.fromhex(token) for token in state['tokens'][:256]} == {bytes([b]) for b in range(256)}
    assert t.decode([*t.encode('red'), t.eos_id, *t.encode('blue')]) == 'red'
    assert t.lower_case and not Tokenizer(train_bpe(['What COLOR is it?'] * 9, 300)).lower_case


def test_bpe_matches_a_plain_reference():
    """The incremental trainer makes the same merges as one that counts all pairs anew every time."""
    texts = ['the cat sat on the mat', 'the bat and the cat', 'a hat that sat']
    words = [([bytes([b]) for b in w.encode()]) for text in texts for w in re.findall(data.WORDS, text)]
    merges = []
    for _ in range(12):
        pairs = Counter(p for w in words for p in zip(w, w[1:]))
        best = max(pairs, key=lambda p: (pairs[p], p))
        if pairs[best] < 2:
            break
        merges.append(best[0] + best[1])
        for w in words:
            j = 0
            while j < len(w) - 1:
                if (w[j], w[j + 1]) == best:
                    w[j:j + 2] = [best[0] + best[1]]
                j += 1
    tokens = [bytes.fromhex(t) for t in train_bpe(texts, 256 + 12 + 3)['tokens']]
    assert tokens[256:] == merges


def test_gpt2_offline(monkeypatch, tmp_path):
    """tokenizer=gpt2 without its files and without a network is a message that says where to put them."""
    def offline(name):
        raise ConnectionError('no network')
    monkeypatch.setattr(data.tiktoken, 'get_encoding', offline)
    with pytest.raises(ValueError, match='TIKTOKEN_CACHE_DIR'):
        Tokenizer({'name': 'gpt2'})


def test_gpt2(monkeypatch):
    """tokenizer=gpt2 runs tiktoken's gpt2 with pad, bos and eos behind its tokens (here on a stand-in with its interface)."""
    stand_in = data.tiktoken.Encoding('gpt2', pat_str=r'\s?\w+', mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={})
    monkeypatch.setattr(data.tiktoken, 'get_encoding', lambda name: stand_in)
    t = Tokenizer({'name': 'gpt2'})
    assert (t.pad_id, t.bos_id, t.eos_id, t.vocab_size) == (256, 257, 258, 259) and t.decode(t.encode('red')) == 'red'


# ---- batches

@pytest.fixture(scope='module')
def questions(tiny_shapes):
    rows = read_rows(tiny_shapes, 'train')
    return Questions(rows, Tokenizer(train_bpe(rows.question, 400)), max_answer_tokens=64)


def test_batches_are_pure(questions):
    """The batch of a step depends on (seed, step) only, in whatever order steps are asked for."""
    steps = len(questions.epoch(16, 1, 0))
    first = [questions.rows_of_step(s, 16, seed=1) for s in range(2 * steps)]
    for s in reversed(range(2 * steps)):
        assert np.array_equal(questions.rows_of_step(s, 16, seed=1), first[s])
    assert not all(np.array_equal(questions.rows_of_step(s, 16, seed=2), first[s]) for s in range(steps))


def test_epochs(questions):
    """No row comes twice in an epoch, most come once, and evaluation sees each exactly once."""
    seen = Counter(i for s in range(len(questions.epoch(16, 1, 0))) for i in questions.rows_of_step(s, 16, seed=1))
    assert max(seen.values()) == 1 and len(seen) > .8 * len(questions.rows)
    assert sorted(i for rows in questions.rows_in_order(16) for i in rows) == list(range(len(questions.rows)))


def test_batch_layout(questions):
    """Answers start with <bos>, targets are the answers shifted by one and end with <eos>, padding is never a target."""
    t = questions.tokenizer
    batch = questions.batch(questions.rows_of_step(0, 16, seed=1))
    assert (batch['answer'][:, 0] == t.bos_id).all()
    for answer, targets in zip(batch['answer'], batch['targets']):
        n = (targets >= 0).sum()
        assert targets[n - 1] == t.eos_id and (targets[n:] == -100).all() and torch.equal(answer[1:n], targets[:n - 1])
        assert (answer[n:] == t.pad_id).all()
    for step in range(12):  # answers of a batch are of like length, and long ones come in small batches
        lengths = [len(questions.tokens[i][1]) for i in questions.rows_of_step(step, 16, seed=1)]
        assert max(lengths) <= max(2, 2 * min(lengths)) and len(lengths) * max(lengths) <= 16 * 8


def test_too_long(tiny_shapes):
    """A question or answer beyond its limit is an error that names row, length and limit; truncate cuts and counts."""
    rows = read_rows(tiny_shapes, 'train')
    t = Tokenizer(train_bpe(rows.question, 400))
    with pytest.raises(ValueError, match=r'row \d+: the question has \d+ tokens, more than max_question_tokens=8.*--truncate=true'):
        Questions(rows, t, max_question_tokens=8)
    cut = Questions(rows, t, max_question_tokens=8, max_answer_tokens=5, truncate=True)
    assert cut.cut > 0 and [max(map(len, column)) for column in zip(*cut.tokens)] == [8, 5]  # questions, answers


def test_few_shapes(tiny_shapes):
    """For a compiler the batches of an epoch have few shapes; they hold the same, and more padding."""
    rows = read_rows(tiny_shapes, 'train')
    t = Tokenizer(train_bpe(rows.question, 400))
    tight, few = (Questions(rows, t, max_question_tokens=64, max_answer_tokens=128, few_shapes=flag) for flag in (False, True))
    shapes = {flag: set() for flag in (False, True)}
    for step in range(60):
        chosen = few.rows_of_step(step, 16, seed=1)
        a, b = tight.batch(chosen), few.batch(chosen)
        for flag, batch in ((False, a), (True, b)):
            shapes[flag].add((*batch['question'].shape[1:], *batch['answer'].shape[1:]))
        for key, value in dict(question=t.pad_id, answer=t.pad_id, targets=-100).items():
            assert torch.equal(b[key][:, :a[key].size(1)], a[key]) and (b[key][:, a[key].size(1):] == value).all()
    assert len(shapes[True]) < len(shapes[False]) and all(Q % 8 == 0 and A & (A - 1) == 0 for Q, A in shapes[True])


def test_few_shapes_of_long_answers(tmp_path):
    """Questions of up to 64 and answers of up to 256 tokens, all lengths mixed: at most 8 x 8 shapes, and a batch whose answers are two tokens or two hundred costs alike."""
    rng = random.Random(0)
    lengths = [(rng.randint(1, 63), int(2 ** rng.uniform(0, 8)) - 1 or 1) for _ in range(6000)]
    rows = read_rows(write(tmp_path / 'a', image=[png()] * len(lengths), question=['q' * q for q, _ in lengths], answer=['a' * a for _, a in lengths]), 'train')
    t = Tokenizer({'name': 'bpe', 'tokens': [f'{b:02x}' for b in range(256)]})
    few, tight = (Questions(rows, t, 64, 256, few_shapes=flag) for flag in (True, False))
    epoch = few.epoch(32, 1, 0)
    shapes, tight_shapes = ([(*b['question'].shape, *b['answer'].shape) for b in map(questions.batch, epoch)] for questions in (few, tight))
    assert len(set(shapes)) <= 64 < len(set(tight_shapes))
    assert all(B * A <= 256 for B, _, _, A in shapes) and sum(B for B, *_ in shapes) > .98 * len(rows)
    real = sum(a + 1 for _, a in lengths)
    assert real / sum(B * A for B, _, _, A in tight_shapes) > .7  # the rest is padding


def test_sum_of_rows(tmp_path):
    """The sum of a split, which tells datasets apart, depends on its pictures, questions, answers and captions and on their order."""
    def total(**change):
        row = dict(image=png((1, 2, 3)), question='q', answer='a', caption='c') | change
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist([row, dict(image=png((9, 9, 9)), question='p', answer='b', caption='d')][::change.get('order', 1)]), folder / 'train.parquet')
        return read_rows(folder, 'train').sum.hexdigest()
    sums = [total(), total(image=png((3, 2, 1))), total(question='Q'), total(answer='A'), total(caption='C'), total(order=-1)]
    assert len(set(sums)) == 6 and total() == sums[0]


def test_batch_holds_its_rows(tiny_shapes):
    """A row's question, whole answer, from its first token on, and picture are those of the data set."""
    rows = read_rows(tiny_shapes, 'train')
    t = Tokenizer(train_bpe(rows.question, 400))
    questions = data.Questions(rows, t, 64, 128)
    for step in range(10):
        chosen = questions.rows_of_step(step, 16, seed=1)
        batch = questions.batch(chosen)
        for k, i in enumerate(chosen):
            assert batch['question'][k][batch['question'][k] != t.pad_id].tolist() == t.encode(rows.question[i])
            assert batch['targets'][k][batch['targets'][k] >= 0].tolist() == t.encode(rows.references[i][0]) + [t.eos_id]
            assert batch['picture'][k] == rows.picture[i]


def test_epochs_differ(tiny_shapes):
    """Every epoch has another order, and its long answers do not come in a row."""
    rows = read_rows(tiny_shapes, 'train')
    questions = data.Questions(rows, Tokenizer(train_bpe(rows.question, 400)), 64, 128)
    one, two = (questions.epoch(4, 1, k) for k in (0, 1))
    assert [b.tolist() for b in one] != [b.tolist() for b in two] and {tuple(sorted(b)) for b in one} != {tuple(sorted(b)) for b in two}
    lengths = [max(len(questions.tokens[i][1]) for i in b) for b in one]
    assert lengths != sorted(lengths) and max(lengths[:len(lengths) // 2]) > 8 < max(lengths[len(lengths) // 2:])
    some = np.concatenate(list(questions.rows_in_order(16, most=40)))
    assert len(some) == len(set(some)) == 40 and sorted(some) != list(range(40)) and (some > len(rows) // 2).sum() > 10
    assert np.array_equal(some, np.concatenate(list(questions.rows_in_order(16, most=40))))
