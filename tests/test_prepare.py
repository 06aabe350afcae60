"""prepare/: small files in the true published forms become datasets, one is drawn; bad rows are listed; pictures are fetched from a server that misbehaves."""

import base64
import csv
import hashlib
import http.server
import io
import json
import math
import random
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unicodedata
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

import data
import prepare
import train
from data import read_rows
from plumbing import tables
from plumbing.tables import SPLITS
from prepare import pixmo

NOISE = random.Random()


@pytest.fixture(autouse=True)
def same_noise_in_every_run():
    NOISE.seed(0)


def picture(seed, size=(20, 12), mode='RGB', form='PNG', **options):
    """A picture file, never the same one twice in a test."""
    buffer = io.BytesIO()
    Image.frombytes('L', size, NOISE.randbytes(size[0] * size[1])).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def imported(format, tmp_path, *flags, source='src'):
    data.main([format, f'--source={tmp_path / source}', f"--out={tmp_path / 'out'}", *flags])
    return {split: read_rows(tmp_path / 'out', split) for split in SPLITS}


def told(rows):
    """What a split tells, row by row: (picture file, question, references)."""
    return list(zip((rows.pictures[k] for k in rows.picture), rows.question, rows.references))


def rejects(tmp_path):
    return [json.loads(line) for line in (tmp_path / 'out/rejects.jsonl').read_text().splitlines()]


def test_vqav2(tmp_path):
    """Questions and annotations are joined by id; ten answers, the commonest first; val2014 is the test split; a row without its picture is listed."""
    for part, ids in (('train2014', range(1, 31)), ('val2014', [100, 101])):
        questions = [dict(question_id=10 * i + k, image_id=i, question=f'What is {k}?') for i in ids for k in range(2)]
        answers = [dict(answer=a, answer_confidence='yes', answer_id=j + 1) for j, a in enumerate(['net', 'net', 'mesh', 'netting', *['net'] * 6])]
        annotations = [dict(question_id=q['question_id'], image_id=q['image_id'], question_type='what is', answer_type='other',
                            multiple_choice_answer='net', answers=answers) for q in reversed(questions)]
        put(tmp_path / f'src/v2_OpenEnded_mscoco_{part}_questions.json', dict(info={}, questions=questions))
        put(tmp_path / f'src/v2_mscoco_{part}_annotations.json', dict(annotations=annotations))
        for i in ids:
            put(tmp_path / f'pics/{part}/COCO_{part}_{i:012}.jpg', picture(i, mode='L' if i == 3 else 'RGB', form='JPEG'))
    (tmp_path / 'pics/train2014/COCO_train2014_000000000005.jpg').unlink()
    rows = imported('vqav2', tmp_path, f"--images={tmp_path / 'pics'}", '--max_bad=0.1')
    assert len(rows['train']) + len(rows['val']) == 58 and len(rows['test']) == 4
    assert rows['test'].references[0] == ['net'] * 8 + ['mesh', 'netting'] and rows['test'].type[0] == 'other' and rows['test'].sample_id[:2] == ['1000', '1001']
    assert [r['sample_id'] for r in rejects(tmp_path)] == ['50', '51'] and 'no image file' in rejects(tmp_path)[0]['reason']


def test_gqa(tmp_path):
    """The files are objects by question id; picture ids need not be numbers; the questions of a picture stand together."""
    entry = lambda image, answer: dict(imageId=image, question='Is it red?', answer=answer, fullAnswer='x', isBalanced=True, types=dict(structural='verify'),
                                       semantic=[], entailed=[], annotations={})
    for part in ('train', 'val', 'testdev'):
        put(tmp_path / f'src/{part}_balanced_questions.json', {'07333408': entry('n250821', f'{part} 1'), '02': entry('2407890', f'{part} 2'), '01': entry('n250821', f'{part} 3')})
    for i, name in enumerate(('n250821', '2407890')):
        put(tmp_path / f'src/images/{name}.jpg', picture(i, form='JPEG'))
    rows = imported('gqa', tmp_path)
    for split, part in zip(SPLITS, ('train', 'val', 'testdev')):
        assert told(rows[split]) == [((tmp_path / f'src/images/{image}.jpg').read_bytes(), 'Is it red?', [f'{part} {k}']) for image, k in (('2407890', 2), ('n250821', 3), ('n250821', 1))]
    assert list(rows['test'].sample_id) == ['02', '01', '07333408'] and list(rows['test'].picture) == [0, 1, 1] and list(rows['val'].type) == ['verify'] * 3


def test_paths_stay_inside(tmp_path):
    """A picture that a published file names by a path out of its folder is not read."""
    put(tmp_path / 'secret.jpg', picture(1, form='JPEG'))
    for part in ('train', 'val', 'testdev'):
        entry = dict(imageId='../../secret', question='Is it red?', answer='yes', types=dict(structural='verify'))
        put(tmp_path / f'src/{part}_balanced_questions.json', {'1': entry, '2': entry | dict(imageId=str(tmp_path / 'secret'))})
    (tmp_path / 'src/images').mkdir()
    with pytest.raises(ValueError, match='6 of 6 rows cannot be used.*the image path leaves the folder'):
        imported('gqa', tmp_path)


def test_clevr(tmp_path):
    """Pictures are RGBA; answers may be true, false and numbers; the type is the program's last function."""
    for part in ('train', 'val'):
        questions = [dict(split=part, image_filename=f'CLEVR_{part}_{i:06}.png', image_index=i, question='How many cubes?', answer=answer, question_index=i,
                          program=[dict(function='scene'), dict(function=f)], question_family_index=1)
                     for i, (answer, f) in enumerate([(3, 'count'), (True, 'exist'), ('no', 'exist'), (False, 'exist'), ('cube', 'query_shape')])]
        put(tmp_path / f'src/questions/CLEVR_{part}_questions.json', dict(info={}, questions=questions))
        for i in range(5):
            put(tmp_path / f'src/images/{part}/CLEVR_{part}_{i:06}.png', picture(i, mode='RGBA'))
    rows = imported('clevr', tmp_path)
    assert [picture for picture, *_ in told(rows['test'])] == [(tmp_path / f'src/images/val/CLEVR_val_{i:06}.png').read_bytes() for i in range(5)]
    assert list(rows['test'].references) == [['3'], ['yes'], ['no'], ['no'], ['cube']] and list(rows['test'].type) == ['count', 'exist', 'exist', 'exist', 'query_shape']


def test_nlvr(tmp_path):
    """JSON lines without a newline at the end, labels that are the words true and false, six pictures to an example."""
    for part in ('train', 'dev', 'test'):
        lines = [json.dumps(dict(sentence=f'There is box {i} of {part}.', label=label, identifier=f'{i}-0', directory='7', evals={}, structured_rep=[]))
                 for i, label in enumerate(('true', 'false'))]
        put(tmp_path / f'src/{part}/{part}.json', '\n'.join(lines))
        for i in range(2):
            for k in range(6):
                put(tmp_path / f'src/{part}/images/7/{part}-{i}-0-{k}.png', picture(i * 6 + k, (400, 100), 'RGBA'))
    rows = imported('nlvr', tmp_path)
    for split, part in zip(SPLITS, ('train', 'dev', 'test')):
        assert told(rows[split]) == [((tmp_path / f'src/{part}/images/7/{part}-{i}-0-{k}.png').read_bytes(), f'There is box {i} of {part}.', [label])
                                     for i, label in enumerate(('true', 'false')) for k in range(6)]
    assert [len(rows[split]) for split in SPLITS] == [12] * 3 and list(rows['val'].references) == [['true']] * 6 + [['false']] * 6


def test_hugging_face(tmp_path):
    """A struct column is read by name; a picture without bytes and a row with two pictures are listed; the file's name tells the split."""
    struct = pa.struct([('path', pa.string()), ('bytes', pa.binary())])  # the order of the first releases
    images = [dict(path='a.png', bytes=picture(i)) for i in range(4)]
    for name in ('train-00000-of-00002', 'train-00001-of-00002', 'validation-00000-of-00001', 'test-00000-of-00001'):
        put(tmp_path / f'src/data/{name}.parquet', b'')
        pq.write_table(pa.table(dict(image=pa.array(images + [dict(path='gone.png', bytes=None)], struct), question=['q?'] * 5, answer=['a'] * 5)),
                       tmp_path / f'src/data/{name}.parquet')
    rows = imported('parquet', tmp_path, '--max_bad=0.3')
    assert [len(rows[split]) for split in SPLITS] == [8, 4, 4] and len(rejects(tmp_path)) == 4
    for split, k in (('train', 0), ('test', 1)):  # as the Hugging Face converts data sets to parquet
        put(tmp_path / f'converted/default/{split}/0000.parquet', b'')
        pq.write_table(pa.table(dict(image=pa.array(images[k:k + 1], struct), question=['q?'], answer=['a'])), tmp_path / f'converted/default/{split}/0000.parquet')
    data.main(['parquet', f"--source={tmp_path / 'converted'}", f"--out={tmp_path / 'converted_out'}"])
    n = [pq.read_metadata(tmp_path / f'converted_out/{split}.parquet').num_rows for split in SPLITS]
    assert n[0] + n[1] == n[2] == 1  # no file is named after val: the picture says where the row for training goes
    pq.write_table(pa.table(dict(images=pa.array([images[:2], images[:1]], pa.list_(struct)), question=['q?'] * 2, answer=[['a', 'b']] * 2)), tmp_path / 'two.parquet')
    data.main(['parquet', f"--source={tmp_path / 'two.parquet'}", f"--out={tmp_path / 'two'}", '--max_bad=0.5'])
    assert '2 pictures in one row' in (tmp_path / 'two/rejects.jsonl').read_text()


def test_one_split_is_divided(tmp_path, capsys):
    """Where files are named after train alone, or train and val, their rows are divided by the pictures, so that there is something to test on, and this is said."""
    for names, most in ((['train'], 60), (['train', 'validation'], 110)):
        source = tmp_path / '-'.join(names)
        for k, name in enumerate(names):
            put(source / f'{name}.parquet', b'')
            pq.write_table(pa.table(dict(image=[picture(60 * k + i) for i in range(60)], question=['q?'] * 60, answer=['a'] * 60)), source / f'{name}.parquet')
        data.main(['parquet', f'--source={source}', f'--out={source}_out'])
        n = [len(read_rows(f'{source}_out', split)) for split in SPLITS]
        assert 'rows for training are divided' in capsys.readouterr().out and sum(n) == 60 * len(names) and min(n) > 0 and (n[1] < 30) == (names == ['train'])


def test_img2dataset(tmp_path):
    """Rows that could not be fetched have no jpg and are missing, not bad; the split follows from the picture."""
    n = 40
    table = pa.table(dict(url=[f'http://x/{i}' for i in range(n)], caption=[f'a thing {i}' for i in range(n)], key=[f'{i:09}' for i in range(n)],
                          status=['success' if i % 4 else 'failed_to_download' for i in range(n)], sha256=['0'] * n,
                          jpg=[picture(i, form='JPEG') if i % 4 else None for i in range(n)]))
    put(tmp_path / 'src/00000.parquet', b'')
    pq.write_table(table, tmp_path / 'src/00000.parquet')
    put(tmp_path / 'src/00000_stats.json', {})
    rows = imported('parquet', tmp_path, '--max_bad=0')
    assert sum(map(len, rows.values())) == 30 and len(rows['train']) > 15 and rows['train'].references[0][0].startswith('a thing')
    assert [r['missing'] for r in rejects(tmp_path)] == [True] * 10


def test_seed(tmp_path):
    """The seed's parquet files: image_bytes, captions with sample_id or id, questions with tags; their splits are kept."""
    for split, k in (('train', 0), ('val', 10), ('test', 20)):
        put(tmp_path / f'src/pixmo_{split}.parquet', b'')
        pq.write_table(pa.table(dict(image_bytes=[picture(k), picture(k + 1)], caption=['A red bus.', 'A dog.'], id=[k, k + 1], image_url=['u', 'v'])),
                       tmp_path / f'src/pixmo_{split}.parquet')
        put(tmp_path / f'qa/pixmo_qa_mixed_{split}.parquet', b'')
        pq.write_table(pa.table(dict(image_url=['u', 'v'], image_sha256=[None, 'x'], image_bytes=[picture(k), picture(k + 1)], source=['pixmo-cap-qa'] * 2,
                                     question=['[USER] What is it? [ASSISTANT]', '[USER] Hi? [ASSISTANT] Hello. [USER] And now? [ASSISTANT]'], answer=['a bus', 'bye'])),
                       tmp_path / f'qa/pixmo_qa_mixed_{split}.parquet')
    rows = imported('parquet', tmp_path)
    assert [list(rows[split].sample_id) for split in SPLITS] == [['0', '1'], ['10', '11'], ['20', '21']] and list(rows['val'].caption) == ['A red bus.', 'A dog.']
    data.main(['parquet', f"--source={tmp_path / 'qa'}", f"--out={tmp_path / 'qa_out'}"])
    qa = read_rows(tmp_path / 'qa_out', 'test')
    assert list(zip(qa.question, qa.references)) == [('What is it?', ['a bus']), ('Hi?', ['Hello.']), ('And now?', ['bye'])] and list(qa.picture) == [0, 1, 1]


def test_table(tmp_path):
    """CSV and JSON lines with pictures beside them; a line without its picture, with an empty answer or that is no object is listed by name."""
    for i in range(30):
        put(tmp_path / f'src/p{i}.png', picture(i))
    with open(put(tmp_path / 'src/mine.csv', ''), 'w', newline='', encoding='utf-8-sig') as f:
        out = csv.writer(f)
        out.writerow(['image', 'question', 'answer'])
        out.writerows([f'p{i}.png', 'what, "exactly"?', f'thing {i}'] for i in range(30))
        out.writerows([['gone.png', 'q?', 'a'], ['p1.png', 'q?', ''], ['../secret.png', 'q?', 'a']])
    put(tmp_path / 'secret.png', picture(1))
    data.main(['table', f"--source={tmp_path / 'src/mine.csv'}", f"--out={tmp_path / 'out'}", '--max_bad=0.1'])
    rows = {split: read_rows(tmp_path / 'out', split) for split in SPLITS}
    assert sum(map(len, rows.values())) == 30 and rows['train'].question[0] == 'what, "exactly"?'
    assert [(r['sample_id'], r['reason'].split(':')[0]) for r in rejects(tmp_path)] == [
        ('mine.csv-30', 'there is no image file'), ('mine.csv-31', 'the answer is empty or no text'), ('mine.csv-32', "the image path '../secret.png' leaves the folder")]
    for split in ('train', 'val', 'test'):
        put(tmp_path / f'own/{split}.jsonl', '\n'.join(json.dumps(line) for line in (
            dict(image='p1.png', question='q?', answer=['a', 'b'], sample_id=0), dict(image='p2.png', caption='a bird'), dict(image='p3.png', question='q?', answer=7), [1])))
    data.main(['table', f"--source={tmp_path / 'own'}", f"--images={tmp_path / 'src'}", f"--out={tmp_path / 'own_out'}", '--max_bad=0.5'])
    rows = read_rows(tmp_path / 'own_out', 'val')
    assert list(rows.references) == [['a', 'b'], ['a bird']] and list(rows.type) == ['all', 'describe'] and rows.sample_id[0] == '0'
    put(tmp_path / 'bad.jsonl', '{"image": \n')
    with pytest.raises(ValueError, match='bad.jsonl-0: not JSON in UTF-8: line 1'):
        data.main(['table', f"--source={tmp_path / 'bad.jsonl'}", f"--out={tmp_path / 'never'}"])


def pictures_in(folder, n=30):
    for i in range(n):
        put(folder / f'p{i}.png', picture(i))
    return [f'p{i}.png,what is it?,thing {i}' for i in range(n)]


def tried(tmp_path, *flags):
    """Imports a file in a folder of its own. -> (its questions and answers, what was rejected)"""
    out = tmp_path / f'out{len(list(tmp_path.iterdir()))}'
    data.main([*map(str, flags), f'--out={out}', '--max_bad=1'])
    splits = [read_rows(out, split) for split in SPLITS]
    texts = sorted((q, r) for rows in splits for q, r in zip(rows.question, rows.references))
    return texts, [json.loads(line) for line in (out / 'rejects.jsonl').read_text().splitlines()]


def test_malformed_csv(tmp_path):
    """A quote that swallows lines, whether it is closed in another row or never, costs the line that it stands on, by number, and no other; so do a zero byte and
    a field too few. A text of several lines is one."""
    rows = pictures_in(tmp_path)
    expected = {f'thing {i}' for i in range(30)}
    cases = (({5: 'p5.png,"what is it?,thing 5', 20: 'p20.png,"what is it?",thing 20'}, {5}, "not CSV: line 7: ',' expected after"),
             ({5: 'p5.png,"what is it?,thing 5', 8: 'p8.png,what is it?",thing 8'}, {5}, 'not CSV: line 7: a quote is open'),
             ({5: '"p5.png,what is it?,thing 5'}, {5}, 'not CSV: line 7: unexpected end of data'), ({29: 'p29.png,"what,thing 29'}, {29}, 'not CSV: line 31'),
             ({3: 'p3.png,what\0 is it?,thing 3'}, {3}, 'not text: line 5: it has a zero byte'), ({3: 'p3.png,thing 3'}, {3}, 'fewer fields than the header has: line 5'),
             ({3: 'p3.png,"is it\nred, green, or\nblue?",thing 3'}, set(), ''))
    for n, (changed, lost, reason) in enumerate(cases):
        lines = [changed.get(i, row) for i, row in enumerate(rows)]
        put(tmp_path / f'{n}.csv', '\n'.join(['image,question,answer', *lines]))
        texts, rejected = tried(tmp_path, 'table', f"--source={tmp_path / f'{n}.csv'}")
        assert {r[0] for _, r in texts} == expected - {f'thing {i}' for i in lost} and len(texts) == 30 - len(lost), reason
        assert [r['reason'][:len(reason)] for r in rejected] == [reason] * len(lost)


def test_forms_of_tables(tmp_path):
    """Tables as spreadsheets and programs write them: other delimiters, capital letters and spaces in names, suffixes in any case, old line ends, UTF-16, lists in
    JSON, usual names of columns. All give the same rows."""
    rows = pictures_in(tmp_path)
    lines = [dict(image=f'p{i}.png', question='what is it?', answer=f'thing {i}') for i in range(30)]
    csv_of = lambda delimiter, head, end='\n': end.join([head, *(row.replace(',', delimiter) for row in rows)])
    files = {'a.csv': csv_of(';', 'image;question;answer'), 'b.tsv': csv_of('\t', 'image\tquestion\tanswer'), 'c.CSV': csv_of('|', 'Image | Question | Answers'),
             'd.csv': csv_of(',', ' Image, "Question", ANSWER', '\r'), 'e.csv': csv_of(',', 'fileName,prompt,answer').encode('utf-16'),
             'f.csv': csv_of(';', 'sep=;\nimage;question;answer').encode('utf-8-sig'), 'g.json': json.dumps(lines, indent=1), 'h.Json': '\n'.join(map(json.dumps, lines)),
             'i.NDJSON': '\r\n'.join(map(json.dumps, lines)).encode('utf-16'), 'j.jsonl': json.dumps(lines).encode('utf-8-sig')}
    for name, content in files.items():
        put(tmp_path / name, content)
        texts, rejected = tried(tmp_path, 'table', f'--source={tmp_path / name}')
        assert texts == sorted(('what is it?', [f'thing {i}']) for i in range(30)) and not rejected, name


def test_a_fault_of_the_file_is_told_once(tmp_path):
    """A file without the columns that it takes is one error that names those it has, their types, and what may be wrong; a text file in no known encoding, too."""
    rows = '\n'.join(pictures_in(tmp_path, 3))
    for name, content, message in (
            ('a.csv', rows, 'no column image.*it has p0.png, what is it.*is there no header'), ('b.csv', 'image^question^answer\n' + rows, "likely parted by '\\^'"),
            ('c.csv', 'url,question,answer\n' + rows, 'no column image.*python data.py pixmo.*img2dataset'), ('d.csv', 'image,text,Text\n' + rows, 'two columns have the same name'),
            ('e.jsonl', '\n'.join(json.dumps(dict(image='p0.png', question='q', answer=k)) for k in range(30)), 'answer is number: int, expected text'),
            ('f.json', dict(rows=[dict(image='p0.png')]), 'rows \\(list of object\\).*expected a list of objects'), ('g.csv', '', 'the file is empty'),
            ('h.csv', rows.encode('utf-16-le'), 'full of zero bytes'), ('i.json', json.dumps([1]).encode('utf-16'), 'UTF-16; save it as UTF-8'), ('j.xlsx', b'PK', 'expected a name that ends in .csv')):
        put(tmp_path / name, content)
        with pytest.raises(ValueError, match=message) as error:
            data.main(['table', f'--source={tmp_path / name}', f"--out={tmp_path / 'never'}"])
        assert str(error.value).startswith(str(tmp_path / name)) and len(str(error.value)) < 700
    for columns, message in ((dict(question=['q'], answer=[3]), 'answer is number: int64, expected text or list of text'), (dict(question=[['q']], answer=['a']), 'question is list of text, expected text'),
                             (dict(caption=[dict(a='x')]), 'caption is object'), (dict(texts=['x']), 'texts is text, expected list of object')):
        pq.write_table(pa.table(dict(image=[picture(1)]) | columns), put(tmp_path / 'a.parquet', b''))
        with pytest.raises(ValueError, match=message):
            data.main(['parquet', f"--source={tmp_path / 'a.parquet'}", f"--out={tmp_path / 'never'}"])


def test_pictures_in_texts(tmp_path):
    """Pictures written into a table, as a data: URI or in base64, are read; a URL points to what fetches it; no message quotes more than 80 signs of a value."""
    lines, files = [], [picture(i, form=form) for i, form in enumerate(('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF'))]
    for k, content in enumerate(files):
        text = base64.b64encode(content).decode()
        lines += [dict(image=['data:image/png;base64,' + text, text, '\n'.join(text[i:i + 76] for i in range(0, len(text), 76)), text.rstrip('=')][k % 4], question='q?', answer=f'{k}')]
    bad = ['data:image/png;base64,' + 'A%' * 10 ** 5, 'x/' * 10 ** 5, 'https://x.org/' + 'y' * 10 ** 5, 'iVBORw0KGgo' + 'A' * 10 ** 5, 'data:image/png;base64,']
    put(tmp_path / 'a.jsonl', '\n'.join(json.dumps(line) for line in lines + [dict(image=image, question='q?', answer='a') for image in bad] + [dict(image='p', question=['z' * 10 ** 5], answer='a')]))
    texts, rejected = tried(tmp_path, 'table', f"--source={tmp_path / 'a.jsonl'}")
    assert [r[0] for _, r in texts] == [f'{k}' for k in range(6)] and len(rejected) == 6 and max(len(r['reason']) for r in rejected) < 250
    assert 'python data.py pixmo' in rejected[2]['reason'] and 'img2dataset' in rejected[2]['reason'] and rejected[4]['reason'] == 'the image is empty'
    put(tmp_path / 'b.csv', 'image,question,answer\n' + '\n'.join(f'"{line["image"]}",q?,{line["answer"]}' for line in lines) + f'\n{base64.b64encode(picture(9, (300, 300), "RGB")).decode()},q?,6')
    assert len(tried(tmp_path, 'table', f"--source={tmp_path / 'b.csv'}")[0]) == 7


def test_forms_of_talks(tmp_path):
    """Talks in the forms of LLaVA, the_cauldron and chats make a row a turn, from parquet and JSON; what a system says and the marks of pictures are left out; a turn
    without its other half, a role unknown and a talk of nothing are bad rows."""
    talks = dict(texts=[dict(user='what?', assistant='a cat', source='x'), dict(user='and?', assistant='a dog', source='x')],
                 conversations=[{'from': 'human', 'value': '<image>\nwhat?'}, {'from': 'gpt', 'value': 'a cat'}, {'from': 'human', 'value': 'and?'}, {'from': 'gpt', 'value': 'a dog'}],
                 messages=[dict(role='system', content='be brief')] + [dict(role=role, content=text) for role, text in (('user', 'what?'), ('assistant', 'a cat'), ('user', 'and?'), ('assistant', 'a dog'))])
    parts = [dict(role=one['role'], content=[dict(type='image', text=None), dict(type='text', text=one['content'])]) for one in talks['messages']]
    put(tmp_path / 'p.png', picture(1))
    for name, talk in [*talks.items(), ('messages', parts), ('texts', dict(user=['what?', 'and?'], assistant=['a cat', 'a dog']))]:
        pq.write_table(pa.table(dict(images=[[dict(bytes=picture(1), path=None)]], **{name: [talk]})), put(tmp_path / 'a.parquet', b''))
        put(tmp_path / 'a.json', [dict(image='p.png', **{name: talk})])
        for flags in (('parquet', f"--source={tmp_path / 'a.parquet'}"), ('table', f"--source={tmp_path / 'a.json'}")):
            assert tried(tmp_path, *flags) == ([('and?', ['a dog']), ('what?', ['a cat'])], []), (name, flags)
    odd = [talks['messages'][:1], talks['messages'][:2], talks['messages'][:2] + talks['messages'][3:], [dict(role='tool', content='x')], talks['messages'][2:3]]
    put(tmp_path / 'b.json', [dict(image='p.png', messages=talk) for talk in odd] + [dict(images=['p.png', 'p.png'], messages=talks['messages'])])
    texts, rejected = tried(tmp_path, 'table', f"--source={tmp_path / 'b.json'}")
    assert texts == [('and?', ['a dog'])] and [r['reason'].split(':')[0] for r in rejected] == ['the question is no text', 'the answer is empty or no text', 'the answer is empty or no text',
                                                                                             'a message of a talk is of no known role', 'the question is no text', '2 pictures in one row']


def test_one_definition_of_a_row(tmp_path):
    """Captions in a list, answers in a list and under their other name are taken by every importer as data.py takes them; of more than two answers the commonest
    comes first, of equally common ones the one met first; of two the first."""
    rows = [dict(caption=['a dog', 'a brown dog']), dict(question='q1', answers=['c', 'b', 'a', 'b', 'a']), dict(question='q2', answers=['b', 'a']), dict(question='q3', answers=['b'])]
    expected = [['a dog', 'a brown dog'], ['b'], ['b', 'a'], ['b', 'a', 'b', 'a', 'c']]
    put(tmp_path / 'p.png', picture(1))
    put(tmp_path / 'a.jsonl', '\n'.join(json.dumps(row | dict(image='p.png')) for row in rows))
    pq.write_table(pa.Table.from_pylist([dict(image='p.png', caption=row.get('caption'), question=row.get('question'), answers=row.get('answers')) for row in rows]), put(tmp_path / 'a.parquet', b''))
    vqa = [dict(answer=answer, answer_id=i) for i, answer in enumerate(['x', 'y', 'y'])]
    pq.write_table(pa.table(dict(image=['p.png'], question=['q'], answers=[vqa], multiple_choice_answer=['y'])), put(tmp_path / 'vqa.parquet', b''))
    for flags in (('table', f"--source={tmp_path / 'a.jsonl'}"), ('parquet', f"--source={tmp_path / 'a.parquet'}", f'--images={tmp_path}')):
        texts, rejected = tried(tmp_path, *flags)
        assert sorted(references for _, references in texts) == expected and not rejected
    assert tried(tmp_path, 'parquet', f"--source={tmp_path / 'vqa.parquet'}")[0] == [('q', ['y', 'y', 'x'])]


def test_names_tell_splits():
    """A file is of the split that its name tells, in the many spellings there are, and ordinary words tell none."""
    told = dict(train='train train2014 train-00000-of-00005 TRAIN trainSet trainval training minitrain turing_test_train x_train_balanced',
                val='val val2014 minival dev dev1 devset valid validation valMini cocoval valset pixmo_val my-val v2_val2014_questions',
                test='test test2015 testmini testdev test-dev2015 test_std devtest eval evaluation eval2 eval_set testA minitest held_out holdout')
    for split, names in told.items():
        assert {name: prepare.split_of_name(name + '.parquet') for name in names.split()} == dict.fromkeys(names.split(), split)
    plain = 'trains trainers contest latest testimony devices devotion carnival festival interval retrieval oval value valley pictures 00000 a'
    assert {name for name in plain.split() if prepare.split_of_name(name)} == set()


def test_where_files_go(tmp_path, capsys):
    """An import says where each file goes, and that some names tell no split beside others that do; hidden files, and data sets that an import wrote into the source,
    are not read, and this is said."""
    names = ('train.parquet', 'eval.parquet', 'minival.parquet', 'more.parquet', '._train.parquet', '.ipynb_checkpoints/train-checkpoint.parquet', '__MACOSX/train.parquet')
    for k, name in enumerate(names):
        pq.write_table(pa.table(dict(image=[picture(4 * k + i) for i in range(4)], question=['q'] * 4, answer=['a'] * 4)), put(tmp_path / 'src' / name, b''))
    for out in ('out', 'again', 'sub/third'):
        data.main(['parquet', f"--source={tmp_path / 'src'}", f"--out={tmp_path / 'src' / out}"])
        text = capsys.readouterr().out
        for line in ('train.parquet: to train', 'eval.parquet: to test', 'minival.parquet: to val', 'more.parquet: to train, val and test', 'some file names tell a split, others do not', '16 rows read'):
            assert line in text, (out, line)
    assert '9 files are not read' in text and '._train.parquet' in text
    for i in range(12):
        put(tmp_path / f'own/train-{i}.jsonl', json.dumps(dict(image='p.png', question='q', answer='a')))
    put(tmp_path / 'own/p.png', picture(1))
    put(tmp_path / 'own/.~lock.train.jsonl', 'x')
    put(tmp_path / 'own/test.jsonl', json.dumps(dict(image='p.png', question='q', answer='a')))
    data.main(['table', f"--source={tmp_path / 'own'}", f"--out={tmp_path / 'own/out'}", '--max_bad=1'])
    text = capsys.readouterr().out
    assert '12 files, train-0.jsonl ... train-9.jsonl: to train or val' in text and 'test.jsonl: to test' in text and '13 rows read, 1 written' in text


def test_groups(tmp_path, capsys):
    """Pictures of one group land in one split, decided by the group alone; a picture in two groups follows the first; a group that a published test split has keeps
    out of training; where groups are too few for three splits this is said."""
    for i in range(120):
        put(tmp_path / f'p{i}.png', picture(i))
    row = lambda i, group: dict(image=f'p{i}.png', question='q', answer='a', group=group, sample_id=f'{group}/{i}')
    put(tmp_path / 'a.jsonl', '\n'.join(json.dumps(row(i, i // 4)) for i in range(120)) + '\n' + json.dumps(row(0, 99)))
    data.main(['table', f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'a'}"])
    splits_of = {}
    for split in SPLITS:
        for name in read_rows(tmp_path / 'a', split).sample_id:
            splits_of.setdefault(name.split('/')[0], set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of.values()) and set.union(*splits_of.values()) == set(SPLITS) and splits_of['99'] == splits_of['0']
    put(tmp_path / 'own/test.jsonl', json.dumps(row(1, 'film')))
    put(tmp_path / 'own/more.jsonl', '\n'.join(json.dumps(row(i, 'film')) for i in range(2, 20)))
    capsys.readouterr()
    data.main(['table', f"--source={tmp_path / 'own'}", f'--images={tmp_path}', f"--out={tmp_path / 'own_out'}"])
    assert len(read_rows(tmp_path / 'own_out', 'test')) == 19 and 'no rows for train and val, and training needs some in each split: a group of pictures stays in one split' in capsys.readouterr().out


def test_a_group_follows_its_first_picture(tmp_path):
    """Of a group whose first picture another group has put into a split, the other pictures follow it there."""
    for i in range(60):
        put(tmp_path / f'p{i}.png', picture(i))
    row = lambda i, group: json.dumps(dict(image=f'p{i}.png', question='q', answer='a', group=group, sample_id=group))
    put(tmp_path / 'a.jsonl', '\n'.join([row(i, f'A{i}') for i in range(30)] + [row(i + k, f'B{i}') for i in range(30) for k in (0, 30)]))
    data.main(['table', f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'a'}"])
    where = {split: {name for name in read_rows(tmp_path / 'a', split).sample_id if name[0] == 'B'} for split in SPLITS}
    assert sum(map(len, where.values())) == 30 and all(where.values())


def test_tables_in_folders_below(tmp_path, capsys):
    """Tables below others are not read, as they may belong to the pictures, and this is said."""
    put(tmp_path / 'p.png', picture(1))
    row = json.dumps(dict(image='p.png', question='q', answer='a'))
    put(tmp_path / 'a.jsonl', row)
    put(tmp_path / 'sub/b.jsonl', row)
    data.main(['table', f'--source={tmp_path}', f"--out={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    assert '1 files in folders below it are not read' in said and 'sub/b.jsonl' in said and '1 rows read' in said


def test_no_rows_for_a_split(tmp_path, capsys):
    """A data set that cannot be trained on says what was found and what to do."""
    put(tmp_path / 'p.png', picture(1))
    row = json.dumps(dict(image='p.png', question='q', answer='a'))
    for name, content, message in (('a.jsonl', row, 'there are too few for that, 1; give more'), ('test.jsonl', row, 'all files are named after test; add files named after train and val'),
                                   ('b.jsonl', '', 'b.jsonl holds no rows'), ('c.jsonl', row.replace('p.png', 'q.png'), 'no row could be used, for the reasons above')):
        put(tmp_path / name, content)
        data.main(['table', f'--source={tmp_path / name}', f"--out={tmp_path / name.split('.')[0]}", '--max_bad=1'])
        assert message in capsys.readouterr().out


def test_flags_that_are_not_read(tmp_path):
    """A flag that an importer does not read is refused by name, and a folder of pictures that is not there, too; --images is read by all."""
    pq.write_table(pa.table(dict(image=['p.png'], question=['q'], answer=['a'])), put(tmp_path / 'src/a.parquet', b''))
    put(tmp_path / 'pics/p.png', picture(1))
    for flag, message in (('--workers=3', '--workers: parquet fetches no pictures'), ('--retry_failed=true', '--retry_failed: parquet'), ('--images=/none', '--images=/none: no such folder')):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            imported('parquet', tmp_path, flag)
    assert sum(map(len, imported('parquet', tmp_path, f"--images={tmp_path / 'pics'}").values())) == 1


def test_sortofclevr(tmp_path, tiny_encoder, capsys):
    """Every answer follows from the pixels, read here without the generator's scenes; one seed draws the same bytes whatever the other splits' sizes are, and no
    picture twice; answers are balanced; the dataset trains, its two types are reported, and it needs no --source."""
    sizes = dict(train=60, val=8, test=8)
    def draw(name, *flags):
        data.main(['sortofclevr', f'--out={tmp_path / name}', *[f'--n_{split}={n}' for split, n in sizes.items()], *flags])
        return [(tmp_path / name / f'{split}.parquet').read_bytes() for split in SPLITS]
    first = draw('a')
    assert draw('b') == first and draw('c', '--n_train=3')[1:] == first[1:] and not set(draw('d', '--seed=1')) & set(first)
    with pytest.raises(ValueError, match='--source: no such setting'):
        draw('e', '--source=x')

    rgb = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), orange=(255, 156, 0), gray=(128, 128, 128), yellow=(255, 255, 0))
    seen, answers = set(), {}
    for split, n in sizes.items():
        rows = read_rows(tmp_path / 'a', split)
        assert len(rows.pictures) == n and len(rows) == 20 * n and not seen & set(rows.pictures.digests)
        seen |= set(rows.pictures.digests)
        assert len(set(rows.sample_id)) == len(set(zip(rows.picture, rows.question))) == 20 * n
        assert [rows.type[i:i + 20].count('relational') for i in range(0, 20 * n, 20)] == [10] * n and set(rows.type) == {'relational', 'non-relational'}
        scenes = []
        for picture in rows.pictures:
            pixels, scene = Image.open(io.BytesIO(picture)), {}
            at = lambda color: [(x, y) for x in range(75) for y in range(75) if pixels.getpixel((x, y)) == rgb.get(color, (255, 255, 255))]
            for color in rgb:
                xs, ys = zip(*at(color))
                assert max(xs) - min(xs) == max(ys) - min(ys) == 10 and len(xs) in (97, 121)  # whole: nothing covers it, nothing is cut off
                scene[color] = (sum(xs) / len(xs), sum(ys) / len(ys)), 'square' if len(xs) == 121 else 'circle'
            assert pixels.size == (75, 75) and len(at('white')) == 75 * 75 - sum(len(at(color)) for color in rgb)
            scenes.append(scene)
        for k, question, (answer,), type in zip(rows.picture, rows.question, rows.references, rows.type):
            scene = scenes[k]
            color, = [word for word in question.split() if word in rgb]
            (x, y), shape = scene[color]
            near = sorted((math.dist((x, y), place), other) for c, (place, other) in scene.items() if c != color)
            known = {'what shape is the object closest to the C one?': near[0][1], 'what shape is the object furthest from the C one?': near[-1][1],
                     'how many other objects have the shape of the C one?': str([other for _, other in near].count(shape)), 'what shape is the C object?': shape,
                     'is the C object on the left of the picture?': 'yes' if x <= 37 else 'no', 'is the C object at the top of the picture?': 'yes' if y <= 37 else 'no'}
            asked = question.replace(color, 'C')
            assert known[asked] == answer and type == ('relational' if asked in list(known)[:3] else 'non-relational')
            assert near[0][0] < near[1][0] and near[-2][0] < near[-1][0]
            answers.setdefault(asked, []).append(answer)
    assert len(answers) == 6 and all(200 < len(given) < 310 for given in answers.values())
    for asked, given in answers.items():
        assert set(given) <= set('012345') if 'how many' in asked else all(.4 < given.count(a) / len(given) < .6 for a in set(given)), asked

    flags = ['--max_steps=2', '--eval_interval=2', '--batch_size=8', '--n_embd=16', '--n_head=2', '--device=cpu', f"--dataset={tmp_path / 'a'}", f'--encoder={tiny_encoder}']
    for config in ('sortofclevr', 'sortofclevr_encoder'):
        train.main([str(ROOT / f'config/{config}.py'), *flags, f"--cache_dir={tmp_path / 'cache'}", f'--out_dir={tmp_path / config}'])
        assert json.loads((tmp_path / config / 'metrics.json').read_text())['by_type'].keys() == {'relational', 'non-relational'}
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith(('type  ', 'relational', 'non-relational', 'all   ', 'mean of'))]
    assert len(table) == 10 and len({line.rindex('|') for line in table if 'mean' not in line}) == 1


def test_too_many_bad_rows(tmp_path):
    """Over the limit nothing is written but the list of what is wrong; --max_bad=0 allows none."""
    lines = [dict(image='p.png', question='q?', answer='a')] * 60 + [dict(image='html.png', question='q?', answer='a')]
    put(tmp_path / 'src/mine.jsonl', '\n'.join(map(json.dumps, lines)))
    put(tmp_path / 'src/p.png', picture(1))
    put(tmp_path / 'src/html.png', '<html>not found</html>')
    source = f"--source={tmp_path / 'src/mine.jsonl'}"
    with pytest.raises(ValueError, match='1 of 61 rows cannot be used, more than --max_bad=0.0015 allows: mine.jsonl-60: not a picture'):
        data.main(['table', source, f"--out={tmp_path / 'out'}", '--max_bad=0.0015'])
    assert not (tmp_path / 'out').exists() and 'mine.jsonl-60' in (tmp_path / 'out.rejects.jsonl').read_text()
    data.main(['table', source, f"--out={tmp_path / 'out'}", '--max_bad=0.02'])


def test_splits_do_not_depend_on_what_is_there():
    """The split of a picture follows from its bytes alone, about one in ten each for val and test."""
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(4000)]
    names = [prepare.split_of(None, digest) for digest in digests]
    assert 320 < names.count('val') < 490 and 320 < names.count('test') < 490
    assert {prepare.split_of('train or val', digest) for digest in digests[:99]} == {'train', 'val'} and prepare.split_of('test', digests[0]) == 'test'
    assert [prepare.split_of_name(n) for n in ('train-00000-of-00005.parquet', 'pixmo_qa_mixed_val.parquet', 'validation.csv', '00000.parquet', 'contest.jsonl')] == [
        'train', 'val', 'val', None, None]


def test_same_bytes_stay_in_one_split(tmp_path, capsys):
    """A picture of a published test split keeps rows that are divided out of training; two published splits that share one are kept, and it is said."""
    for split, n in (('train', 30), ('test', 2)):
        put(tmp_path / f'src/{split}/questions.json', [['what is it?', 'a thing', i] for i in range(n)])
        for i in range(n):
            put(tmp_path / f'src/{split}/images/{i}.png', picture(i))  # noise, no two alike
    (tmp_path / 'src/train/images/1.png').write_bytes((tmp_path / 'src/test/images/1.png').read_bytes())
    rows = imported('easyvqa', tmp_path, '--max_bad=0.1')
    assert len(rows['train']) + len(rows['val']) == 29 and len(rows['test']) == 2
    assert [(r['sample_id'], r['reason']) for r in rejects(tmp_path)] == [('train-1-1', 'its picture is in the test split too')]
    for name, seeds in (('train', (1, 2)), ('test', (2, 3)), ('more', range(9))):
        put(tmp_path / f'own/{name}.jsonl', '\n'.join(json.dumps(dict(image=f'{i}.png', question='q?', answer='a')) for i in seeds))
    for i in range(9):
        put(tmp_path / f'own/{i}.png', picture(i))
    capsys.readouterr()
    data.main(['table', f"--source={tmp_path / 'own'}", f"--out={tmp_path / 'own_out'}"])
    rows = {split: read_rows(tmp_path / 'own_out', split) for split in SPLITS}
    places = {name: split for split in SPLITS for name in rows[split].sample_id}
    assert sum(map(len, rows.values())) == 13 and [places[f'more.jsonl-{i}'] for i in (1, 2, 3)] == ['train', 'test', 'test']
    assert '1 rows have a picture that another split has too; splits are kept as they were published: train.jsonl-1 of train is in test' in capsys.readouterr().out


def test_bad_texts(tmp_path, capsys):
    """What cannot be written is a bad row: half a character, another encoding, a caption that is no text; so is a line with a field too many, a line that is
    no JSON, and a path that no file can have. Names and types that are no text become text. The console counts by kind."""
    put(tmp_path / 'p.png', picture(1))
    good = dict(image='p.png', question='q?', answer='a')
    lines = [good, good | dict(answer='\ud800'), good | dict(question=['q?']), good | dict(caption=7), dict(image='p.png', caption='\udfff'), good | dict(image='p.png\0'),
             good | dict(image='x' * 999), good | dict(image='.'), good | dict(type=5, sample_id=6), good | dict(image='../p.png'), good | dict(image='../../p.png')]
    put(tmp_path / 'a.jsonl', b'\n'.join([*(json.dumps(line).encode() for line in lines), b'{"image": "p.png", "question": "caf\xe9?", "answer": "a"}', b'{']))
    data.main(['table', f"--source={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", '--max_bad=1'])
    assert [(r['sample_id'], r['reason'].split(':')[0]) for r in rejects(tmp_path)] == [
        ('a.jsonl-1', 'the question or answer is not in UTF-8'), ('a.jsonl-2', 'the question is no text'), ('a.jsonl-3', 'the caption is no text'),
        ('a.jsonl-4', 'the caption is not in UTF-8'), ('a.jsonl-5', "the image path 'p.png\\x00' is none"), ('a.jsonl-6', 'the image file cannot be read'),
        ('a.jsonl-7', 'the image file cannot be read'), ('a.jsonl-9', "the image path '../p.png' leaves the folder"),
        ('a.jsonl-10', "the image path '../../p.png' leaves the folder"), ('a.jsonl-11', 'not JSON in UTF-8'), ('a.jsonl-12', 'not JSON in UTF-8')]
    text = capsys.readouterr().out
    assert '13 rows read, 2 written, 0 without a picture, 11 bad' in text and '| 2 the image path leaves the folder' in text and '2 not JSON in UTF-8' in text
    put(tmp_path / 'b.csv', b'image,question,answer\np.png,q?,a\np.png,what, is it?,red\np.png,caf\xe9?,a\np.png,q?\n')
    data.main(['table', f"--source={tmp_path / 'b.csv'}", f"--out={tmp_path / 'out_b'}", '--max_bad=1'])
    assert [json.loads(line)['reason'] for line in (tmp_path / 'out_b/rejects.jsonl').read_text().splitlines()] == [
        'more fields than the header has: line 3', 'the question or answer is not in UTF-8', 'fewer fields than the header has: line 5']


def test_parquet_in_another_encoding(tmp_path):
    """A text column of a parquet file that holds another encoding than UTF-8 costs the rows that do, not the file; training names the row."""
    words = pa.array([b'caf\xe9?', b'what?', None, 'café?'.encode()]).cast(pa.binary()).view(pa.string())
    put(tmp_path / 'src/a.parquet', b'')
    pq.write_table(pa.table(dict(image=[picture(i) for i in range(4)], question=words, answer=['x'] * 4)), tmp_path / 'src/a.parquet')
    rows = imported('parquet', tmp_path, '--max_bad=0.5')
    assert sorted(q for split in rows.values() for q in split.question) == ['café?', 'what?']
    assert sorted(r['reason'] for r in rejects(tmp_path)) == ['the question is no text', 'the question or answer is not in UTF-8']
    (tmp_path / 'src/a.parquet').rename(tmp_path / 'src/train.parquet')
    with pytest.raises(ValueError, match='2 of 4 rows cannot be used: row 0: the question or answer is not in UTF-8; row 2: the question is no text'):
        read_rows(tmp_path / 'src', 'train')


def test_a_bad_text_costs_its_row(tmp_path):
    """Text in another encoding than UTF-8 costs its row and no other, whatever column it is in: large, a view, a dictionary, a struct or a list."""
    texts = pa.array([b'caf\xe9', b'what?', b'who?'])
    large, view = texts.cast(pa.large_binary()).view(pa.large_string()), texts.view(pa.string()).cast(pa.string_view())
    coded = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), texts.view(pa.string()))
    listed = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts.view(pa.string()))
    messages = pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), pa.concat_arrays([a for i in range(3) for a in (texts.view(pa.string())[i:i + 1], pa.array(['a']))]))
    rest = dict(image=[picture(i) for i in range(3)])
    for k, columns in enumerate((dict(question=large), dict(question=view), dict(question=coded), dict(answer=listed), dict(messages=messages))):
        table = pa.table(rest | dict(question=['q?'] * 3, answer=['a'] * 3) | columns)
        pq.write_table(table, put(tmp_path / f'{k}/a.parquet', b''))
        data.main(['parquet', f"--source={tmp_path / f'{k}/a.parquet'}", f"--out={tmp_path / f'{k}_out'}", '--max_bad=0.5'])
        n = [pq.read_metadata(tmp_path / f'{k}_out/{split}.parquet').num_rows for split in SPLITS]
        bad = [json.loads(line) for line in (tmp_path / f'{k}_out/rejects.jsonl').read_text().splitlines()]
        assert sum(n) == 2 and [(r['sample_id'], r['reason']) for r in bad] == [('a-0', 'the question or answer is not in UTF-8')], list(columns)
    bad = pa.StructArray.from_arrays([texts.view(pa.string()), listed], ['a', 'b'])
    assert tables.plain_rows(pa.record_batch([bad], ['x']))[:2] == [dict(x=dict(a='caf\udce9', b=['caf\udce9'])), dict(x=dict(a='what?', b=['what?']))]


def test_import_takes_what_the_encoder_takes(tmp_path):
    """A picture that the encoder would refuse is a bad row of an import, and one with odd EXIF is none."""
    buffer, jpeg = io.BytesIO(), io.BytesIO()
    Image.new('F', (9, 9), .5).save(buffer, 'TIFF')
    Image.new('RGB', (9, 9)).save(jpeg, 'JPEG', exif=b'Exif\0\0nothing')
    put(tmp_path / 'src/a.jsonl', '\n'.join(json.dumps(dict(image=name, question='q?', answer='a')) for name in ('float.tif', 'p.jpg')))
    put(tmp_path / 'src/float.tif', buffer.getvalue())
    put(tmp_path / 'src/p.jpg', jpeg.getvalue())
    with pytest.raises(ValueError, match='1 of 2 rows cannot be used.*a.jsonl-0: a grey picture of mode F with values from 0.5 to 0.5: expected 8 or 16 bits'):
        data.main(['table', f"--source={tmp_path / 'src/a.jsonl'}", f"--out={tmp_path / 'out'}", '--max_bad=0'])


def test_links_may_leave_the_folder(tmp_path):
    """A folder of pictures that is a link to another disk works, for import and for training; `..` and paths from elsewhere do not, and the flag that helps is named."""
    put(tmp_path / 'disk/p.png', picture(1))
    put(tmp_path / 'secret.png', picture(2))
    put(tmp_path / 'src/a.jsonl', '\n'.join(json.dumps(dict(image=name, question='q?', answer='a')) for name in ('pictures/p.png', 'pictures/../pictures/p.png', 'pictures/../../secret.png', str(tmp_path / 'secret.png'))))
    (tmp_path / 'src/pictures').symlink_to(tmp_path / 'disk')
    data.main(['table', f"--source={tmp_path / 'src/a.jsonl'}", f"--out={tmp_path / 'out'}", '--max_bad=0.5'])
    assert [r['sample_id'] for r in rejects(tmp_path)] == ['a.jsonl-2', 'a.jsonl-3'] and all('leaves the folder' in r['reason'] and '--images=FOLDER' in r['reason'] for r in rejects(tmp_path))
    for split in SPLITS:
        pq.write_table(pa.table(dict(image=['pictures/p.png'], question=['q?'], answer=['a'])), tmp_path / f'src/{split}.parquet')
    assert list(read_rows(tmp_path / 'src', 'train').pictures) == [(tmp_path / 'disk/p.png').read_bytes()]
    assert prepare.read_inside(tmp_path / 'src/pictures/p.png', ['', str(tmp_path / 'src')]) == (tmp_path / 'disk/p.png').read_bytes()
    assert '--images=FOLDER' in prepare.read_inside(tmp_path / 'src/../secret.png', ['', str(tmp_path / 'src')])


@pytest.mark.parametrize('on_disk, written', [('NFC', 'NFD'), ('NFD', 'NFC')])
def test_both_unicode_forms_of_a_name(tmp_path, on_disk, written):
    """A picture is found whose name has another Unicode form on the disk than in the table, its folder's too; one that is not there is still said to be missing."""
    folder, name = (unicodedata.normalize(on_disk, text) for text in ('Gemälde', 'é è.png'))
    put(tmp_path / 'où' / folder / name, picture(1))
    other = unicodedata.normalize(written, 'Gemälde/é è.png')
    assert other != f'{folder}/{name}' and tables.read_image(other, tmp_path / 'où') == (tmp_path / 'où' / folder / name).read_bytes()
    assert tables.read_image(unicodedata.normalize(written, 'Gemälde/é.png'), tmp_path / 'où').startswith('there is no image file')


def test_temporary_folder_is_named(tmp_path, monkeypatch):
    """Where temporary files cannot be made, or fill the disk, the message names their folder and TMPDIR; both kinds are in the same one."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    known, long, message = tables.KnownPictures(), tables.OnDisk(), f'{tmp_path}: temporary files cannot be written here.*TMPDIR'
    known.table.execute('PRAGMA max_page_count = 4')  # of 4 kB
    with pytest.raises(OSError, match=message):
        for i in range(999):
            known[hashlib.sha256(bytes([i % 256, i // 256])).digest()] = 'x' * 99
    long.file.close()
    long.file = open('/dev/full', 'w+b', buffering=0)
    with pytest.raises(OSError, match=message):
        long.append('x' * 99)
    assert known.table.execute('PRAGMA temp_store_directory').fetchone() == (str(tmp_path),)
    monkeypatch.setattr(prepare, 'temporary_table', lambda columns: known.table)
    with pytest.raises(OSError, match=message):
        list(prepare.sorted_on_disk(((1, 2), 'x' * 999) for _ in range(99)))
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda: open(tmp_path / 'no/such/folder', 'w+b'))
    with pytest.raises(OSError, match=message):
        tables.OnDisk()


def test_one_large_picture_asked_often(tmp_path, monkeypatch):
    """A picture of 0.4 MB that 120 rows ask for is held once, however it comes, in an import and in reading; and is stored once, as plain bytes."""
    large = picture(1, (650, 650), mode='L', compress_level=0)
    put(tmp_path / 'table/p.png', large)
    put(tmp_path / 'table/a.jsonl', '\n'.join(json.dumps(dict(image='p.png', question=f'{i}?', answer='a')) for i in range(120)))
    for part, n in (('train', 120), ('test', 0)):
        put(tmp_path / f'easyvqa/{part}/questions.json', [[f'{i}?', 'a', 0] for i in range(n)])
        put(tmp_path / f'easyvqa/{part}/images/0.png', large)
    coded = pa.DictionaryArray.from_arrays(pa.array([0] * 120, pa.int32()), pa.array([large]))
    pq.write_table(pa.table(dict(image=coded, question=['q?'] * 120, answer=['a'] * 120)), put(tmp_path / 'parquet/a.parquet', b''), store_schema=False, dictionary_pagesize_limit=2 ** 24)
    monkeypatch.setattr(tables, 'BATCH_BYTES', 10 ** 6)
    reads, read_file = [], prepare.read_file
    monkeypatch.setattr(prepare, 'read_file', lambda path, key: reads.append(path) or read_file(path, key))
    for format in ('table', 'easyvqa', 'parquet'):
        out = tmp_path / f'{format}_out'
        tracemalloc.start()
        data.main([format, f"--source={tmp_path / format}{'/a.jsonl' if format == 'table' else ''}", f'--out={out}'])
        rows = {split: read_rows(out, split) for split in SPLITS}
        assert [len(p) for r in rows.values() for p in r.pictures] == [len(large)]
        assert tracemalloc.get_traced_memory()[1] < 10 * len(large), format
        tracemalloc.stop()
        files = [out / f'{split}.parquet' for split in SPLITS]
        assert sum(f.stat().st_size for f in files) < 1.1 * len(large) and all(pq.read_schema(f).field('image').type == pa.binary() for f in files)
    assert len(reads) == 1


def test_large_row_groups(tmp_path, monkeypatch):
    """Of a row group of 20 MB, its pictures in structs, only a few are in memory while all are read, and while one is; an import reads ahead no more than it may."""
    pictures = [picture(i, (700, 700), mode='L', compress_level=0) for i in range(40)]
    struct_of = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    images = pa.chunked_array([pa.array([dict(bytes=p, path=f'{i}.png')], struct_of) for i, p in enumerate(pictures)])  # a page each
    for split, n in (('train', 40), ('val', 1), ('test', 1)):
        pq.write_table(pa.table(dict(image=images, question=['q?'] * 40, answer=['a'] * 40)).slice(0, n), put(tmp_path / f'src/{split}.parquet', b''))
    monkeypatch.setattr(tables, 'BATCH_BYTES', 2 ** 19)
    monkeypatch.setattr(prepare, 'CHUNK_BYTES', 2 ** 20)
    arrow, all_of_it, before = [], sum(map(len, pictures)), pa.total_allocated_bytes()
    rows = read_rows(tmp_path / 'src', 'train')
    tracemalloc.start()
    for k, found in enumerate(rows.pictures):
        arrow.append(pa.total_allocated_bytes() - before)
        assert found == pictures[k]
    for k in (30, 7, 7, 8, 39, 0):
        assert rows.pictures[k] == pictures[k]
        arrow.append(pa.total_allocated_bytes() - before)
    data.main(['parquet', f"--source={tmp_path / 'src'}", f"--out={tmp_path / 'out'}"])
    assert max(arrow) < all_of_it / 3 and tracemalloc.get_traced_memory()[1] < all_of_it * .8
    tracemalloc.stop()
    assert rows.pictures[39] == pictures[39]
    (tmp_path / 'src/train.parquet').unlink()
    pq.write_table(pa.table(dict(image=pictures[:5])), tmp_path / 'src/train.parquet')
    assert rows.pictures[30] == 'it is gone: the file has changed since it was read first' == rows.pictures[30]


def test_memory(tmp_path):
    """Importing three times the rows, pictures and bad rows takes no more memory, reading them a few numbers a row."""
    peaks = []
    for n in (4000, 12000):
        pictures = [b'P6 4 4 255\n' + i.to_bytes(8, 'big') * 6 for i in range(n + 2)]
        table = pa.table(dict(image=pictures, question=['q?' if i % 50 else ' ' for i in range(n)] + ['q?'] * 2, answer=['a'] * (n + 2), caption=['c'] * (n + 2)))
        for split, start, rows in (('train', 0, n), ('val', n, 1), ('test', n + 1, 1)):
            put(tmp_path / f'{n}-src/{split}.parquet', b'')
            pq.write_table(table.slice(start, rows), tmp_path / f'{n}-src/{split}.parquet')
        del table
        del pictures
        tracemalloc.start()
        data.main(['parquet', f"--source={tmp_path / f'{n}-src'}", f"--out={tmp_path / f'{n}'}", '--max_bad=1'])
        imported, _ = tracemalloc.get_traced_memory()[1], tracemalloc.reset_peak()
        rows = read_rows(tmp_path / f'{n}', 'train')
        peaks.append((imported, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
        assert len(rows.pictures) == len(rows) == .98 * n
    assert peaks[1][0] < 1.1 * peaks[0][0] and peaks[1][1] - peaks[0][1] < 60 * 8000, peaks


def test_json_in_pieces(tmp_path, monkeypatch):
    """A JSON file gives the same values, of the same types, read a few signs at a time as read whole, of a list, an object, or a key of one; a file that ends early
    is refused, and one of another form, or of lists in lists in lists."""
    value = {'info': {'n': [1, 2.5e3, None], 'text': 'a "b" \\ \n [{'}, 'year': 12345, 'questions': [{'id': 123456, 'a': [True, 'ä日🙂']}, 17, 'x', [], {}, -1.5]}
    monkeypatch.setattr(prepare, 'PIECE', 3)
    for indent in (None, 2):
        for ascii in (True, False):
            path = tmp_path / 'a.json'
            path.write_text(json.dumps(value, indent=indent, ensure_ascii=ascii), encoding='utf-8')
            assert list(prepare.read_json(path, 'questions')) == value['questions'] and list(prepare.read_json(path)) == list(value.items())
            assert repr(list(prepare.read_json(path, 'info'))) == repr(list(value['info'].items()))  # 1 is no 1.0
            path.write_text(json.dumps(value['questions'], indent=indent, ensure_ascii=ascii), encoding='utf-8')
            assert list(prepare.read_json(path)) == value['questions']
            for end in (1, 9, 30):
                put(tmp_path / 'b.json', path.read_bytes()[:-end])
                with pytest.raises(ValueError, match='b.json: not JSON of the published form'):
                    list(prepare.read_json(tmp_path / 'b.json'))
    for content, key in (({'a': 1}, 'questions'), ([1], 'questions'), ('x', None), ({'questions': 3}, 'questions'), ('', None), (b'["caf\xe9"]', None), (b'[1, 2] 3', None),
                         (b'[' * 10 ** 5 + b']' * 10 ** 5, None), (b'{"questions": [1], "a": {"questions": 2}, "b"', 'questions'), ({'a': {'questions': [1]}}, 'questions')):
        put(tmp_path / 'b.json', content if isinstance(content, bytes) else json.dumps(content))
        with pytest.raises(ValueError, match='b.json: not JSON of the published form'):
            list(prepare.read_json(tmp_path / 'b.json', key))


def test_json_in_little_memory(tmp_path):
    """A JSON file of three times the length takes no more memory; its values are never all there."""
    peaks = []
    for n in (10000, 30000):
        path = put(tmp_path / f'{n}.json', dict(info={'skipped': [['x' * 9] * 9] * (n // 9)}, questions=[dict(id=i, text='q' * 99) for i in range(n)]))
        tracemalloc.start()
        assert sum(q['id'] for q in prepare.read_json(path, 'questions')) == n * (n - 1) // 2
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 2 ** 20 < path.stat().st_size / 2, peaks


def test_half_a_character(tmp_path):
    """Half a character, which JSON can write and UTF-8 cannot, is kept for the check of rows, and none becomes a ? silently; whole ones stay whole."""
    for text in ('a\ud800b', '\udc00', '\ud83d\U0001f642', '\ud83d', '\U0001f642\U0001f642'):
        assert list(prepare.read_json(put(tmp_path / 'a.json', ['x' * 99, {'q': text}]))) == ['x' * 99, {'q': text}]


def test_json_without_ijson(tmp_path, monkeypatch):
    """Without the optional package the message says what to install."""
    monkeypatch.setitem(sys.modules, 'ijson', None)
    with pytest.raises(ValueError, match='a.json: to read it, pip install ijson'):
        list(prepare.read_json(put(tmp_path / 'a.json', [1])))


def test_vqav2_without_partner(tmp_path):
    """A question without an annotation and an annotation without a question are bad rows with the question's number."""
    for part in ('train2014', 'val2014'):
        put(tmp_path / f'src/v2_OpenEnded_mscoco_{part}_questions.json', dict(questions=[dict(question_id=k, image_id=1, question='q') for k in (1, 2)]))
        put(tmp_path / f'src/v2_mscoco_{part}_annotations.json', dict(annotations=[dict(question_id=k, image_id=1, answer_type='other', answers=[dict(answer='a')]) for k in (2, 3)]))
        put(tmp_path / f'src/{part}/COCO_{part}_{1:012}.jpg', picture(1))
    imported('vqav2', tmp_path, '--max_bad=1')
    assert [(r['sample_id'], r['reason']) for r in rejects(tmp_path)] == [('1', 'the question has no annotation'), ('3', 'the question is no text')] * 2


def test_talks(tmp_path):
    """A turn without an answer is a bad row, not a lost one."""
    assert list(prepare.turns('q', 'a', ['one', 'two', 'three'])) == [('one', 'two'), ('three', None)] and list(prepare.turns('q', 'a', 'text')) == [('q', 'a')]


def test_pictures_in_odd_shapes():
    """Gigantic, animated, empty and cut off pictures, and headers that lie about the size, are refused with a reason whose kind stands before a colon."""
    from plumbing.pictures import open_picture
    chunk = lambda kind, content: struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    png = lambda w, h, pixels=b'': b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>2I5B', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')
    moving = picture(1, mode='P', form='GIF', save_all=True, append_images=[Image.new('P', (20, 12), 9)])
    for content, reason in ((png(60000, 60000), 'more than 67108864 pixels'), (png(9000, 9000), 'more than 67108864 pixels'), (png(4000, 4000, bytes(9)), 'not a picture that can be decoded'),
                            (png(0, 0), 'not a picture'), (png(5, 0), 'not a picture'), (moving, 'animated'), (picture(1)[:-30], 'not a picture that can be decoded'),
                            (b'<html>', 'not a picture'), (b'', 'not a picture')):
        with pytest.raises(ValueError) as error:
            open_picture(content)
        assert str(error.value).split(':')[0] == reason
    assert open_picture(png(2, 2, bytes(10 ** 6))).size == (2, 2)  # pixels behind the picture are left alone


def mutated(rng, content):
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        kind, i = rng.randrange(4), rng.randrange(max(1, len(content)))
        if kind == 0 and content:
            content[i] = rng.randrange(256)
        elif kind == 1:
            del content[i:i + rng.randint(1, 40)]
        elif kind == 2:
            content[i:i] = rng.randbytes(rng.randint(1, 9))
        else:
            del content[i:]
    return bytes(content)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_fuzz_pictures():
    """Of thousands of mutated picture files each is decoded or refused with a reason, none ends in another error."""
    from plumbing.pictures import open_picture
    rng = random.Random(0)
    seeds = [picture(i, form=form, mode=mode) for i, (form, mode) in enumerate(
        [('PNG', 'RGB'), ('PNG', 'P'), ('JPEG', 'RGB'), ('JPEG', 'L'), ('GIF', 'P'), ('WEBP', 'RGB'), ('BMP', 'RGB'), ('TIFF', 'RGB'), ('PPM', 'RGB'), ('PNG', 'RGBA'), ('DDS', 'RGB')])]
    opened = 0
    for i in range(3000):
        try:
            open_picture(mutated(rng, seeds[i % len(seeds)]))
            opened += 1
        except ValueError:
            pass
    assert 0 < opened < 3000


def published_files(tmp_path):
    """{format: (file to mutate, flags, rows of it)} for every importer but pixmo, with the other files that it needs."""
    shot, jpg, files = picture(1), picture(2, form='JPEG'), {}
    put(tmp_path / 'a.parquet', b'')
    pq.write_table(pa.table(dict(image=[shot, jpg], question=['q', '[USER] q [ASSISTANT]'], answer=['a', 'b'])), tmp_path / 'a.parquet')
    files['parquet'] = tmp_path / 'a.parquet', ['--source={file}'], 2
    for name, text in (('csv', 'image,question,answer\np.png,q?,a\np.png,"q, r",b\n'), ('jsonl', '{"image": "p.png", "question": "q?", "answer": "a"}\n{"image": "p.png", "caption": "c"}')):
        files[name] = put(tmp_path / f't.{name}', text), ['--source={file}'], 2
    put(tmp_path / 'p.png', shot)
    put(tmp_path / 'easy/test/questions.json', [])
    files['easyvqa'] = put(tmp_path / 'easy/train/questions.json', [['q', 'a', 0], ['r', 'yes', 1], ['s', 'b', 0]]), [f"--source={tmp_path / 'easy'}"], 3
    clevr = [dict(split='train', image_filename=f'{k}.png', image_index=k, question='q', answer=a, question_index=k, program=[dict(function='count')]) for k, a in enumerate((3, True, 'no'))]
    put(tmp_path / 'clevr/questions/CLEVR_val_questions.json', dict(questions=[]))
    files['clevr'] = put(tmp_path / 'clevr/questions/CLEVR_train_questions.json', dict(info={}, questions=clevr)), [f"--source={tmp_path / 'clevr'}"], 3
    gqa = {str(k): dict(imageId=f'n{k}', question='q', answer='yes', types=dict(structural='verify')) for k in range(3)}
    for part in ('val', 'testdev'):
        put(tmp_path / f'gqa/{part}_balanced_questions.json', {})
    files['gqa'] = put(tmp_path / 'gqa/train_balanced_questions.json', gqa), [f"--source={tmp_path / 'gqa'}"], 3
    for part in ('dev', 'test'):
        put(tmp_path / f'nlvr/{part}/{part}.json', '')
    nlvr = [json.dumps(dict(sentence='s', label='true', identifier=f'{k}-0', directory='7')) for k in range(2)]
    files['nlvr'] = put(tmp_path / 'nlvr/train/train.json', '\n'.join(nlvr)), [f"--source={tmp_path / 'nlvr'}"], 2
    asked, told = ([dict(question_id=k, image_id=k % 2, question='q') for k in range(3)],
                   [dict(question_id=k, image_id=k % 2, answer_type='other', answers=[dict(answer='a', answer_id=j) for j in range(10)]) for k in range(3)])
    for part, (q, a) in (('val2014', ([], [])), ('train2014', (asked, told))):
        files['vqav2 questions'] = put(tmp_path / f'vqa/v2_OpenEnded_mscoco_{part}_questions.json', dict(questions=q)), [f"--source={tmp_path / 'vqa'}"], 3
        files['vqav2'] = put(tmp_path / f'vqa/v2_mscoco_{part}_annotations.json', dict(annotations=a)), [f"--source={tmp_path / 'vqa'}"], 3
    for k in range(3):
        for path in (f'easy/train/images/{k}.png', f'clevr/images/train/{k}.png', f'gqa/images/n{k}.jpg', f'vqa/train2014/COCO_train2014_{k:012}.jpg'):
            put(tmp_path / path, shot)
    return files


def test_fuzz_importers(tmp_path):
    """Hundreds of mutated files, bytes or values of every importer's format: used or refused with a reason, none ends in another error; and a value of another
    type or without a key costs at most its row, which is listed."""
    rng, n = random.Random(0), 0

    def spoilt(value):  # one value somewhere in JSON is another one, or gone
        if isinstance(value, (dict, list)) and value and rng.random() < .85:
            key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
            if isinstance(value, dict) and rng.random() < .2:
                del value[key]
            else:
                value[key] = spoilt(value[key])
            return value
        return rng.choice([None, 7, -.5, True, '', 'x', '\ud800', [], [1], {}, dict(a=1)])

    def try_import(format, flags):
        nonlocal n
        n += 1
        out = tmp_path / f'o{n}'
        try:
            data.main([{'csv': 'table', 'jsonl': 'table'}.get(format, format.split()[0]), *flags, f'--out={out}', '--max_bad=1'])
        except (ValueError, FileNotFoundError):
            return None
        return sum(pq.read_metadata(out / f'{split}.parquet').num_rows for split in SPLITS) + len((out / 'rejects.jsonl').read_text().splitlines())

    for format, (file, flags, rows) in published_files(tmp_path).items():
        whole, flags = file.read_bytes(), [flag.format(file=file) for flag in flags]
        assert (try_import(format, flags) or 0) >= rows
        for _ in range(25):
            put(file, mutated(rng, whole))
            try_import(format, flags)
            if format == 'parquet':
                put(tmp_path / 'd/train.parquet', file.read_bytes())
                try:
                    read_rows(tmp_path / 'd', 'train')
                except ValueError:
                    pass
        for _ in range(0 if format in ('parquet', 'csv') else 40):
            if format in ('jsonl', 'nlvr'):
                lines = whole.decode().splitlines()
                put(file, '\n'.join([json.dumps(spoilt(json.loads(lines[0]))), *lines[1:]]))
            else:
                put(file, json.dumps(spoilt(json.loads(whole))).encode())
            found = try_import(format, flags)
            if format in ('jsonl', 'nlvr'):
                assert found >= rows, file.read_bytes()
            elif found is not None:  # a file whose outer form is another one is refused whole
                value = json.loads(file.read_bytes())
                assert found >= len(value.get('questions', value.get('annotations', value)) if isinstance(value, dict) else value), file.read_bytes()
        put(file, whole)


# ----------------------------------------------------------------------------
# PixMo: pictures by URL

class Server(http.server.BaseHTTPRequestHandler):
    """Misbehaves as the path says, and counts what it is asked."""
    asked, good, busy = {}, picture(7, form='JPEG'), {}

    def do_GET(self):
        path = self.path.split('?')[0]
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        body = self.good if path != '/other' else picture(8)
        if path.startswith('/busy') and self.asked[self.path] <= 2:
            self.send_response(429)
            self.send_header('Retry-After', '0')
            self.end_headers()
            return
        if path == '/gone':
            return self.send_error(404)
        if path == '/broken':
            return self.send_error(503)
        if path in ('/moved', '/loop', '/file', '/inside'):
            self.send_response(302)
            self.send_header('Location', {'/moved': '/ok?caf\xe9 x', '/loop': '/loop', '/file': 'file:///etc/passwd', '/inside': 'http://10.0.0.1/x'}[path])
            self.end_headers()
            return
        if path.startswith('/later') and self.asked[self.path] <= 1:
            self.send_response(429)
            self.send_header('Retry-After', '1')
            return self.end_headers()
        if path in ('/slow', '/drip', '/flood'):
            if path != '/drip':  # else not even a status line ends
                self.send_response(200)
                self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b'x' * (10 ** 5 if path == '/flood' else 1))
                    time.sleep(.05 * (path != '/flood'))
            except OSError:
                pass
            return
        if path == '/chunks':
            self.wfile.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n' + f'{len(body):x}\r\n'.encode() + body[:-9])
            return
        if path == '/reset':
            self.connection.close()
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(body) + 99 * (path == '/cut')))
        self.end_headers()
        if path == '/html':
            body = b'<html>This photo is unavailable</html>'.ljust(len(body))
        try:
            self.wfile.write(body)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.asked.clear()
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


FLAGS = ['--allow_private=true', '--timeout_s=1', '--retries=2', '--backoff_s=0.01', '--workers=8', '--max_bad=0']


def test_fetch(tmp_path, server, capsys):
    """Every way in which a server fails has its reason in the manifest; what can be had is had; failures are asked again only when told to."""
    sha = hashlib.sha256(Server.good).hexdigest()
    fates = {'/ok': '', '/ok?a=1': '', '/ok?caf\xe9 au lait': '', '/busy': '', '/moved': '', '/gone': 'status 404', '/broken': 'status 503', '/loop': 'more than 5 redirects',
             '/file': 'neither http nor https', '/slow': 'timed out', '/drip': 'timed out', '/reset': 'no connection', '/cut': 'cut off', '/chunks': 'cut off',
             '/html': 'not a picture: it is a web page, not the file itself: download that again, by its direct link', '/other': 'another picture than it was (sha256)'}
    urls = [server + path for path in fates] + ['ftp://x/y', 'http://', 'no url', 'http://x:y/']
    put(tmp_path / 'src/train-00000-of-00001.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls, image_sha256=[sha.upper() if u.endswith('/ok') else sha if u.endswith('/other') else None for u in urls],
                                 question=['What?'] * len(urls), answer=['a bus'] * len(urls))), tmp_path / 'src/train-00000-of-00001.parquet')
    put(tmp_path / 'src/train-00001-of-00001.parquet', b'')
    pq.write_table(pa.table(dict(image_url=[server + '/other'], question=['What?'], answer=['a bus'])), tmp_path / 'src/train-00001-of-00001.parquet')  # without its sha256
    start = time.time()
    rows = imported('pixmo', tmp_path, f"--images={tmp_path / 'pics'}", *FLAGS)
    assert time.time() - start < 10
    text = capsys.readouterr().out
    manifest = {e['url']: e['reason'] for e in map(json.loads, (tmp_path / 'pics/manifest.jsonl').read_text().splitlines())}
    assert {path: manifest[server + path] for path in fates} == fates | {'/reset': manifest[server + '/reset']}
    assert manifest[server + '/reset'] in ('no connection', 'not HTTP')
    assert [manifest[url] for url in urls[-4:]] == ['neither http nor https', 'not a URL', 'neither http nor https', 'not a URL']
    assert '20 pictures asked for, 5 there, 15 not: 3 neither http nor https' in text and '2 timed out' in text and '2 cut off' in text
    assert sum(map(len, rows.values())) == 5 and len(rejects(tmp_path)) == 16 and all(r['missing'] for r in rejects(tmp_path))
    assert Server.asked['/busy'] == 3 and Server.asked['/broken'] == 3 and Server.asked['/gone'] == 1
    before = dict(Server.asked)
    again = ['pixmo', f"--source={tmp_path / 'src'}", f"--images={tmp_path / 'pics'}", *FLAGS]
    data.main([*again, f"--out={tmp_path / 'out2'}"])
    assert Server.asked == before
    data.main([*again, f"--out={tmp_path / 'out3'}", '--retry_failed=true'])
    assert Server.asked['/gone'] == 2 and Server.asked['/ok'] == before['/ok']
    # a picture that another set named without a sha256 is checked when one is given
    put(tmp_path / 'more.parquet', b'')
    pq.write_table(pa.table(dict(image_url=[server + '/ok?a=1'], image_sha256=['0' * 64], question=['What?'], answer=['a bus'])), tmp_path / 'more.parquet')
    data.main(['pixmo', f"--source={tmp_path / 'more.parquet'}", f"--images={tmp_path / 'pics'}", *FLAGS, f"--out={tmp_path / 'out4'}"])
    assert 'another picture than it was' in (tmp_path / 'out4/rejects.jsonl').read_text()


def test_urls_in_little_memory(tmp_path, monkeypatch):
    """Three times the URLs, all of them known to the manifest, take no more memory; the last line about a URL counts, and one of another set is left alone."""
    peaks = []
    for n in (2000, 6000):
        folder = tmp_path / f'{n}'
        urls = [f'https://example.org/{i:0100}' for i in range(n)]
        put(folder / 'manifest.jsonl', '\n'.join(json.dumps(dict(url=url, sha256=None, reason=reason)) for reason in ('timed out', 'status 404') for url in urls + ['http://x/']) + '\n')
        pq.write_table(pa.table(dict(image_url=[*urls, None, ''], caption=['c'] * (n + 2))), put(folder / 'a.parquet', b''))
        tracemalloc.start()
        asked = pixmo.urls_of([folder / 'a.parquet'])
        pixmo.fetch(asked, folder, prepare.ImportConfig(source='x', out='y'))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert list(asked) == [(url, 'status 404') for url in urls] and not (folder / 'out').exists()
    assert peaks[1] < 1.2 * peaks[0], peaks


def fate(url, **options):
    """What becomes of a URL: the number of bytes, or why there are none."""
    config = prepare.ImportConfig(source='x', out='y', **dict(timeout_s=1., retries=0) | options)
    try:
        return len(pixmo.get(url, config))
    except pixmo.Failed as e:
        return str(e)


def test_fetch_limits(server):
    """Files over most_bytes are refused, whether their length was told or not; the pause that a server asks for is kept."""
    assert fate(server + '/ok', allow_private=True, most_bytes=100) == fate(server + '/flood', allow_private=True, most_bytes=100) == 'more than 100 bytes'
    start = time.time()
    assert fate(server + '/later', allow_private=True, retries=1, backoff_s=0.) == len(Server.good) and 1 <= time.time() - start < 3


def test_private_addresses(server, monkeypatch):
    """Private addresses are refused unless they are allowed, also behind a redirect and behind a name, which is looked up once for each connection."""
    for host in ('localhost', '[::1]', '0.0.0.0', '169.254.169.254', '10.1.2.3', '192.168.0.1', '100.64.0.1', '[::ffff:127.0.0.1]', '[fd00::1]', '2130706433', '127.1'):
        assert fate(f'http://{host}/x') in ('a private address', 'no connection'), host
    assert fate(server + '/ok') == 'a private address' and fate(server + '/ok', allow_private=True) == len(Server.good)
    port, looked_up, connected, real, real_lookup = int(server.split(':')[2]), [], [], socket.create_connection, socket.getaddrinfo

    def lookup(host, *args, **kwargs):
        looked_up.append(host)
        if host.endswith('.test'):  # the second answer is another one
            return [(None, None, None, None, ('93.184.216.34' if looked_up.count(host) == 1 else '127.0.0.1', port))]
        return real_lookup(host, *args, **kwargs)

    def connect(address, timeout):
        connected.append(address[0])
        with monkeypatch.context() as patch:
            patch.setattr(socket, 'getaddrinfo', real_lookup)
            return real(('127.0.0.1', port), timeout)

    monkeypatch.setattr(pixmo.socket, 'getaddrinfo', lookup)
    monkeypatch.setattr(pixmo.socket, 'create_connection', connect)
    assert fate('http://one.test/ok') == len(Server.good) and looked_up == ['one.test'] and connected == ['93.184.216.34']
    assert fate('http://two.test/inside') == 'a private address' and connected == ['93.184.216.34'] * 2  # where /inside points to was not asked
    assert fate('http://one.test/ok') == 'a private address' and len(connected) == 2


@pytest.mark.skipif(not shutil.which('openssl'), reason='makes a certificate with openssl')
def test_https(tmp_path, monkeypatch):
    """Pictures come by https where the certificate is valid for the host, and else not."""
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', tmp_path / 'key.pem', '-out', tmp_path / 'cert.pem', '-days', '2', '-subj', '/CN=localhost',
                    '-addext', 'subjectAltName=DNS:localhost'], check=True, capture_output=True)
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / 'cert.pem', tmp_path / 'key.pem')
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f'https://localhost:{httpd.server_port}/ok'
    assert fate(url, allow_private=True).startswith('no valid certificate: ')
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'cert.pem'))
    assert fate(url, allow_private=True) == len(Server.good)
    assert fate(url.replace('localhost', '127.0.0.1'), allow_private=True).startswith('no valid certificate: ')
    assert fate(url.replace('/ok', '/slow'), allow_private=True) == 'timed out' and fate(url.replace('https', 'http'), allow_private=True) in ('no connection', 'not HTTP', 'timed out')
    httpd.shutdown()


def test_fetch_goes_on(tmp_path, server, monkeypatch):
    """A fetch that is killed keeps what it has; the same command fetches the rest; a torn last line of the manifest does no harm."""
    urls = [f'{server}/ok?{i}' for i in range(20)]
    put(tmp_path / 'src/a.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls, caption=['A bus.'] * 20)), tmp_path / 'src/a.parquet')
    real, calls = pixmo.get, []

    def killed(url, config):
        calls.append(url)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(url, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pixmo, 'get', killed)
        imported('pixmo', tmp_path, f"--images={tmp_path / 'pics'}", *FLAGS, '--workers=1')
    assert not (tmp_path / 'out').exists()
    with open(tmp_path / 'pics/manifest.jsonl', 'a') as f:
        f.write('{"url": "http')
    first = dict(Server.asked)
    rows = imported('pixmo', tmp_path, f"--images={tmp_path / 'pics'}", *FLAGS)
    assert sum(map(len, rows.values())) == 20 and sum(Server.asked.values()) <= 22 and len(first) >= 7
    assert list(rows['train'].type) == ['describe'] * len(rows['train'])


def test_pixmo_forms(tmp_path, server):
    """cap-qa with messages of several turns, and counts, as pixmo-points has them too; a picture of the published test split (here all are the same) takes its other questions there."""
    urls = [f'{server}/ok?{i}' for i in range(3)]
    put(tmp_path / 'src/train-00000.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls[:1], question=['[USER] Hi [ASSISTANT]'], answer=['x'], messages=[['Hi', 'x', 'More?', 'No.']])), tmp_path / 'src/train-00000.parquet')
    put(tmp_path / 'src/count/test-0.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls[1:], count=pa.array([3, 0], pa.int32()), label=['cats', 'dogs'], points=[None, None])), tmp_path / 'src/count/test-0.parquet')
    put(tmp_path / 'src/points/train-0.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls[1:], image_sha256=[None] * 2, points=[[dict(x=1., y=2.)] * 2, []], count=pa.array([2, 0], pa.int64()), label=['hats', None],
                                 collection_method=['pointing', 'counting'])), tmp_path / 'src/points/train-0.parquet')
    rows = imported('pixmo', tmp_path, f"--images={tmp_path / 'pics'}", *FLAGS[:-1], '--max_bad=0.2')
    assert [(r['sample_id'], r['reason']) for r in rejects(tmp_path)] == [('train-0-1', 'the question is no text')]
    everything = sorted((q, r[0]) for split in rows.values() for q, r in zip(split.question, split.references))
    assert everything == [('Hi', 'x'), ('How many cats are there?', '3'), ('How many dogs are there?', '0'), ('How many hats are there?', '2'), ('More?', 'No.')]
    assert list(rows['test'].question) == ['How many cats are there?', 'How many dogs are there?', 'How many hats are there?', 'Hi', 'More?']
