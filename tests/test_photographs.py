"""Datasets of photographs: mosaics, whose answers are found again in the pixels; DAQUAR and captioned photographs in their published forms."""

import csv
import io
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import lab.cells
import train
from data import read_rows
from encoder import Encoder, EncoderConfig, save_encoder
from prepare import mosaics

COLORS = {'red_fox': (200, 30, 30), 'Ox': (30, 200, 30), 'fish': (30, 30, 200), 'airplane': (200, 200, 30), 'bus': (30, 200, 200)}
GROUPS = 'animals: red fox, ox, fish\n\n# what moves by itself\nvehicles: airplane, bus\n'
NOISE = random.Random(0)


def photo(path, color, size=(40, 30)):
    """A photograph of one colour, with a grain that makes no two files equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new('RGB', size, color)
    picture.putpixel((0, 0), tuple(NOISE.randrange(256) for _ in range(3)))
    picture.save(path)


def on_one_core(draw, sizes, shard):
    for split, n in sizes.items():
        for row in draw(split, 0, n):
            yield split, row


@pytest.fixture
def classes(tmp_path, monkeypatch):
    monkeypatch.setattr(mosaics, 'on_all_cores', on_one_core)  # to start processes takes seconds
    NOISE.seed(0)
    for name, color in COLORS.items():
        for i in range(24):
            photo(tmp_path / f'photos/{name}/{i}.png', color)
    (tmp_path / 'groups.txt').write_text(GROUPS)
    return tmp_path


def made(folder, *flags):
    out = folder / f'out{len(list(folder.glob("out*")))}'
    data.main(['mosaics', f'--source={folder}/photos', f'--out={out}', '--n_train=60', '--n_val=10', '--n_test=20', '--cell_px=16', *flags])
    return {split: read_rows(out, split) for split in ('train', 'val', 'test')}


def cells_of(data, grid):
    """The classes of a mosaic, row by row, by the colour in the middle of each photograph."""
    picture = Image.open(io.BytesIO(data))
    px = picture.width // grid
    found = []
    for k in range(grid ** 2):
        seen = picture.getpixel((k % grid * px + px // 2, k // grid * px + px // 2))
        near = min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(seen, COLORS[name])))
        found.append(near.replace('_', ' ').lower())
    return found


PLURALS = {'red foxes': 'red fox', 'oxes': 'ox', 'fish': 'fish', 'airplanes': 'airplane', 'buses': 'bus'}
CLASSES = sorted(PLURALS.values())
MEMBERS = dict(animals=('red fox', 'ox', 'fish'), vehicles=('airplane', 'bus'))


def answer(question, cells, grid):
    """What the answer should be, from the words of the question alone."""
    def count(words):
        return sum(c in MEMBERS[words] for c in cells) if words in MEMBERS else cells.count(PLURALS[words])

    def step(side, k):
        return k + {'left of': -1, 'right of': 1, 'above': -grid, 'below': grid}[side]

    if found := re.fullmatch('what is at the (.*)\\?', question):
        words = found[1].split()
        row = {'top': 0, 'middle': 1, 'bottom': grid - 1, 'center': 1}[words[0]]
        column = {'left': 0, 'center': 1, 'right': grid - 1}[words[-1]]
        return cells[row * grid + column]
    if found := re.fullmatch('(is there an?|are there any) (.*)\\?', question):
        return 'yes' if (count(found[2]) if 'any' in found[1] else found[2] in cells) else 'no'
    if found := re.fullmatch('how many (.*) are there\\?', question):
        return str(count(found[1]))
    if found := re.fullmatch('are there more (.*) than (.*)\\?', question):
        return 'yes' if count(found[1]) > count(found[2]) else 'no'
    sides = 'left of|right of|above|below'
    if found := re.fullmatch(f'what is ({sides}) the photo ({sides}) the (.*)\\?', question):
        return cells[step(found[1], step(found[2], cells.index(found[3])))]
    if found := re.fullmatch(f'what is ({sides}) the (.*)\\?', question):
        return cells[step(found[1], cells.index(found[2]))]
    raise AssertionError(question)


@pytest.mark.parametrize('grid', [2, 3])
def test_mosaics_ask_what_is_there(classes, grid, monkeypatch):
    """Every answer follows from the question and the pixels; captions name what is where; all six types are asked."""
    if grid == 2:
        monkeypatch.undo()  # on all cores
    rows = made(classes, f'--groups={classes}/groups.txt', f'--grid={grid}', '--describe=1')
    types = Counter()
    for split in rows.values():
        for i in range(len(split)):
            cells = cells_of(split.pictures[split.picture[i]], grid)
            types[split.type[i]] += 1
            if split.type[i] == 'describe':
                assert re.findall('an? (.*?) at the', split.references[i][0]) == cells
            else:
                true = answer(split.question[i], cells, grid)
                assert list(split.references[i]) == [true], split.question[i]
                seen = torch.eye(len(CLASSES))[[CLASSES.index(c) for c in cells]]  # who sees everything, and reasons, is always right
                assert lab.cells.answer(split.type[i], split.question[i], seen, CLASSES, {name: set(of) for name, of in MEMBERS.items()}) == true
    assert set(types) == {*mosaics.ASK, 'describe'} and len(rows['train'].pictures) > 40  # two may be the same
    asked = ' '.join(rows['train'].question)
    assert 'animals' in asked and 'a bus' in asked and 'an airplane' in asked and 'red foxes' in asked


def test_a_photograph_is_in_one_split(classes, monkeypatch):
    """By its file's content, also where a published split repeats one; one seed gives the same mosaics; another does not."""
    used = {}

    def paste(files, config):
        used.setdefault(split, set()).update(Path(file).read_bytes() for file in files)
        return b''

    photos = classes / 'photos'
    for name in COLORS:
        for i in range(24):
            (photos / ('test' if i < 4 else 'train') / name).mkdir(parents=True, exist_ok=True)
            (photos / name / f'{i}.png').rename(photos / ('test' if i < 4 else 'train') / name / f'{i}.png')
        (photos / name).rmdir()
        again = photos / 'test' / name / '0.png'
        (photos / 'train' / name / '99.png').write_bytes(again.read_bytes())
    config = mosaics.Config(source=str(photos), n_train=40)
    found = mosaics.photographs(config)
    monkeypatch.setattr(mosaics, 'paste', paste)
    for split in ('train', 'test'):
        mosaics.mosaic_rows(config, found, {}, split, 0, 40)
    test = {file.read_bytes() for file in (photos / 'test').glob('*/*.png')}
    assert len(used['train']) > 20 and used['test'] <= test and not used['train'] & test
    kept = {split: sum(map(len, of_split.values())) for split, of_split in found.items()}
    assert kept['test'] == 20 and kept['train'] + kept['val'] == 100 and kept['val'] > 0


def test_one_seed_one_dataset(classes):
    first, second, other = made(classes), made(classes), made(classes, '--seed=2')
    assert [list(r['train'].question) for r in (first, second)] == [list(first['train'].question)] * 2 != [list(other['train'].question)] * 2
    assert first['train'].sum.hexdigest() == second['train'].sum.hexdigest() != other['train'].sum.hexdigest()


def test_mosaics_say_what_is_wrong(classes, capsys):
    """No source, no folder, too few classes, a group of an unknown class, photographs that are torn, half of the splits."""
    with pytest.raises(ValueError, match='--source is needed'):
        data.main(['mosaics'])
    with pytest.raises(FileNotFoundError, match='no such folder'):
        data.main(['mosaics', '--source=nowhere', f'--out={classes}/none'])
    (classes / 'groups.txt').write_text('animals: red fox, unicorn\n')
    with pytest.raises(ValueError, match='line 1.*unicorn.*of the classes airplane, bus, fish'):
        made(classes, f'--groups={classes}/groups.txt')
    torn = (classes / 'photos/bus/0.png').read_bytes()[:60]
    for i in range(4):
        (classes / f'photos/bus/torn{i}.png').write_bytes(torn + bytes([i]))
    with pytest.raises(ValueError, match='4 of 124 photographs cannot be used: .*bus.*torn0.png: .*; ...: remove or repair them'):
        made(classes)
    made(classes, '--max_bad=0.04')
    assert '4 of 124 photographs cannot be used' in capsys.readouterr().out
    for i in range(4):
        (classes / f'photos/bus/torn{i}.png').unlink()
    for name in ('airplane', 'fish', 'Ox'):
        (classes / f'photos/{name}').rename(classes / name)
    with pytest.raises(ValueError, match='photographs of 2 classes for train: expected three'):
        made(classes)
    for name in ('red_fox', 'bus'):
        (classes / f'photos/{name}').rename(classes / name)
    (classes / 'photos/train').mkdir()
    with pytest.raises(ValueError, match='it has train: expected train and test'):
        made(classes)


def test_what_is_no_photograph_of_a_class(classes, capsys):
    """Hidden files and folders, links to nothing; the same photograph again, in another class too; a class called train; names in other scripts."""
    photos = classes / 'photos'
    for place in ('.ipynb_checkpoints', 'bus/.hidden', 'bus'):
        photo(photos / place / ('._x.png' if place == 'bus' else 'x.png'), (0, 0, 0))
    (photos / 'bus/gone.png').symlink_to(classes / 'nothing.png')
    (photos / 'bus/folder.png').mkdir()
    (photos / 'Ox/again.png').write_bytes((photos / 'bus/3.png').read_bytes())
    photo(photos / 'train' / 'e.png', (1, 2, 3))
    (photos / 'Ox/linked').symlink_to(photos / 'bus')
    for name in ('a.heic', 'b.HEIC', 'README'):
        (photos / 'Ox' / name).write_text('no picture of a known kind')
    found = mosaics.photographs(mosaics.Config(source=str(photos)))
    said = capsys.readouterr().out
    assert {name for of_split in found.values() for name in of_split} == {*CLASSES, 'train'} and '1 photographs are left out' in said
    assert '4 other things are left out (2 .heic, 1 without ending, 1 linked folder)' in said and len(re.findall('(?:train|val|test): no photograph of (?:.*, )?train: ', said)) == 2
    assert sum(map(len, (files for of_split in found.values() for files in of_split.values()))) == 121
    assert mosaics.class_name('E\u0301le\u0301phant_d-Asie') == 'éléphant d asie' and mosaics.class_name('हिन्दी') == 'हिन्दी'
    (photos / 'bus').rename(photos / '__')
    with pytest.raises(ValueError, match='__: a folder is called after its class'):
        mosaics.photographs(mosaics.Config(source=str(photos)))


@pytest.mark.parametrize('line', ['buses: airplane', 'animals: fish\nanimals: ox', ': fish', 'animals:', 'ox: fish'])
def test_groups_that_say_two_things(classes, line):
    (classes / 'groups.txt').write_bytes(b'\xef\xbb\xbf' + line.encode())
    with pytest.raises(ValueError, match='line [12]: '):
        mosaics.read_groups(classes / 'groups.txt', CLASSES)
    (classes / 'groups.txt').write_bytes(b'\xef\xbb\xbfanimals: fish, ox,\r\n  # more\r\n')
    assert mosaics.read_groups(classes / 'groups.txt', CLASSES) == dict(animals={'fish', 'ox'})


def test_mosaics_balance_answers(classes):
    """Whoever knows the question alone gains little: no answer to a type is much more frequent than it must be."""
    config = mosaics.Config(source='x', describe=0)
    photos = {'train': {name: ['f'] for name in 'abcdefgh'}}
    mosaics.paste, paste = lambda files, config: b'', mosaics.paste
    try:
        rows = mosaics.mosaic_rows(config, photos, dict(firsts=set('abcd'), lasts=set('efgh')), 'train', 0, 2000)
    finally:
        mosaics.paste = paste
    counts = {type: Counter(row['answer'] for row in rows if row['type'] == type) for type in mosaics.ASK}
    for type, most in dict(what=.15, exist=.53, relation=.15, compare=.6, count=.3).items():
        assert counts[type].most_common(1)[0][1] < most * counts[type].total(), (type, counts[type])


def test_cells(classes, capsys):
    """A probe of a random encoder's patches tells the colours of one-coloured photographs, and what follows is right: both are printed."""
    made(classes, f'--groups={classes}/groups.txt', '--describe=0', '--cell_px=32')
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=32, n_layer=1, n_latents=0, projection='none', vision_dim=32, prefixes=(32,)))
    save_encoder(encoder, classes / 'encoder.pt')
    train.main([f'--dataset={classes}/out0', f'--encoder={classes}/encoder.pt', f'--out_dir={classes}/run', f'--cache_dir={classes}/cache', '--max_steps=1', '--eval_interval=1', '--device=cpu',
                '--vocab_size=300', '--max_answer_tokens=12', '--max_question_tokens=60'])
    capsys.readouterr()
    lab.cells.main([f'--out_dir={classes}/run', f'--groups={classes}/groups.txt', '--device=cpu'])
    text = capsys.readouterr().out
    assert float(re.search('cells: (.*) of 20 named rightly', text)[1]) >= .9
    assert float(re.search(r'all +\| +\d+ \| (\S+)', text)[1]) >= .85
    train.main([f'--dataset={classes}/out0', '--use_vision=false', f'--out_dir={classes}/blind', '--max_steps=1', '--eval_interval=1', '--device=cpu', '--vocab_size=300',
                '--max_answer_tokens=12', '--max_question_tokens=60'])
    with pytest.raises(ValueError, match='blind: a run without vision'):
        lab.cells.main([f'--out_dir={classes}/blind', '--device=cpu'])
    cells = lab.cells.cells_of(torch.arange(16.).view(1, 16, 1), 2)
    assert cells.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize('form', ['lists', 'raw'])
def test_daquar(form, tmp_path):
    """Lines two by two; the split of the pictures is kept and val is taken from those to train on; the number of the picture is left out."""
    images = {split: [f'image{i}' for i in numbers] for split, numbers in dict(train=range(1, 41), test=range(41, 46)).items()}
    lines = {split: ''.join(f'what is left of the bed in the {name} ?\ngarbage_bin\nhow many chairs are in the {name} in the {name} ?\n{k % 3}\n' for k, name in enumerate(names))
             for split, names in images.items()}
    source = tmp_path / 'src'
    for k, name in enumerate(images['train'] + images['test']):
        photo(source / f'images/{name}.png', (k, k, k))
    if form == 'lists':
        (source / 'all_qa_pairs.txt').write_text(lines['test'] + lines['train'])
        for split, names in images.items():
            (source / f'{split}_images_list.txt').write_text('\n'.join(names))
    else:
        for split in images:
            (source / f'qa.894.raw.{split}.txt').write_text(lines[split])
    data.main(['daquar', f'--source={source}', f'--out={tmp_path}/out'])
    rows = {split: read_rows(tmp_path / 'out', split) for split in ('train', 'val', 'test')}
    assert len(rows['test']) == 10 and len(rows['train']) + len(rows['val']) == 80 and len(rows['val']) > 0
    assert set(rows['train'].question) == {'what is left of the bed?', 'how many chairs are?'}
    assert {r[0] for r in rows['train'].references} == {'garbage bin', '0', '1', '2'} and set(rows['test'].type) == {'thing', 'count'}
    if form == 'lists':  # an answer that is missing does not move those below it, a picture that is in no list is said
        (source / 'all_qa_pairs.txt').write_text(lines['test'] + 'is it in the image3 ?\n\nis it in the image99 ?\nno\n' + lines['train'])
        data.main(['daquar', f'--source={source}', f'--out={tmp_path}/more', '--max_bad=0.1'])
        assert [len(read_rows(tmp_path / 'more', split)) for split in rows] == [len(of_split) for of_split in rows.values()]
        assert 'image99 is in neither list' in (tmp_path / 'more/rejects.jsonl').read_text()
    with pytest.raises(FileNotFoundError, match='expected all_qa_pairs.txt'):
        data.main(['daquar', f'--source={tmp_path}', f'--out={tmp_path}/none'])


@pytest.mark.parametrize('form', ['csv', 'quoted', 'bars', 'token'])
def test_captions(form, tmp_path):
    """All captions of a picture are one row's; commas are words; both published forms."""
    names = [f'{i}_{"ab"[i % 2]}.jpg' for i in range(12)]
    for k, name in enumerate(names):
        photo(tmp_path / f'images/{name}', (20 * k, 0, 0))
    said = {name: [f'A dog , a cat and number {k} .', f'Again "{k}"'] for k, name in enumerate(names)}
    if form == 'csv':
        text = 'image,caption\n' + ''.join(f'{name},{caption}\n' for name in names for caption in said[name])
    elif form == 'quoted':
        text = io.StringIO(newline='')
        csv.writer(text).writerows([('Image', 'Caption'), *((name, caption) for name in names for caption in said[name])])
        text = text.getvalue()
    elif form == 'bars':
        text = 'image_name| comment_number| comment\n' + ''.join(f'{name}| {k}| {caption}\n' for name in names for k, caption in enumerate(said[name]))
    else:
        text = ''.join(f'{name}#{k}\t{caption}\n' for name in names for k, caption in enumerate(said[name]))
    (tmp_path / ('Flickr8k.token.txt' if form == 'token' else 'captions.txt')).write_text(text)
    data.main(['captions', f'--source={tmp_path}', f'--out={tmp_path}/out'])
    rows = [(split.sample_id[i], list(split.references[i])) for split in (read_rows(tmp_path / 'out', name) for name in ('train', 'val', 'test')) for i in range(len(split))]
    assert sorted(rows) == sorted(said.items())
    (tmp_path / 'bad.txt').write_text('a.jpg,A dog\n')
    with pytest.raises(ValueError, match='first line is a.jpg,A dog: expected a header'):
        data.main(['captions', f'--source={tmp_path}/bad.txt', f'--out={tmp_path}/none'])
    with pytest.raises(FileNotFoundError, match='captions.txt'):
        data.main(['captions', f'--source={tmp_path}/images', f'--out={tmp_path}/none'])
