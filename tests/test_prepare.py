"""prepare/: small files in the true published forms become datasets, one is drawn; bad rows are listed; pictures are fetched from a server that misbehaves."""

import csv
import hashlib
import http.server
import io
import json
import math
import random
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data
import prepare
import train
from conftest import ROOT
from data import read_rows
from prepare import pixmo


def picture(seed, size=(20, 12), mode='RGB', form='PNG', **options):
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert('L').point(lambda v: (v * (seed + 3)) % 256).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def imported(format, tmp_path, *flags, source='src'):
    data.main([format, f'--source={tmp_path / source}', f"--out={tmp_path / 'out'}", *flags])
    return {split: read_rows(tmp_path / 'out', split) for split in data.SPLITS}


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
        put(tmp_path / f'src/{part}_balanced_questions.json', {'07333408': entry('n250821', 'yes'), '02': entry('2407890', 'no'), '01': entry('n250821', 'no')})
    for i, name in enumerate(('n250821', '2407890')):
        put(tmp_path / f'src/images/{name}.jpg', picture(i, form='JPEG'))
    rows = imported('gqa', tmp_path)
    assert list(rows['test'].sample_id) == ['02', '01', '07333408'] and list(rows['test'].picture) == [0, 1, 1] and list(rows['val'].type) == ['verify'] * 3


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
    assert list(rows['test'].references) == [['3'], ['yes'], ['no'], ['no'], ['cube']] and list(rows['test'].type) == ['count', 'exist', 'exist', 'exist', 'query_shape']


def test_nlvr(tmp_path):
    """JSON lines without a newline at the end, labels that are the words true and false, six pictures to an example."""
    for part in ('train', 'dev', 'test'):
        lines = [json.dumps(dict(sentence='There is a box.', label=label, identifier=f'{i}-0', directory='7', evals={}, structured_rep=[]))
                 for i, label in enumerate(('true', 'false'))]
        put(tmp_path / f'src/{part}/{part}.json', '\n'.join(lines))
        for i in range(2):
            for k in range(6):
                put(tmp_path / f'src/{part}/images/7/{part}-{i}-0-{k}.png', picture(i * 6 + k, (400, 100), 'RGBA'))
    rows = imported('nlvr', tmp_path)
    assert [len(rows[split]) for split in data.SPLITS] == [12] * 3 and list(rows['val'].references) == [['true']] * 6 + [['false']] * 6


def test_hugging_face(tmp_path):
    """A struct column is read by name; a picture without bytes and a row with two pictures are listed; the file's name tells the split."""
    struct = pa.struct([('path', pa.string()), ('bytes', pa.binary())])  # the order of the first releases
    images = [dict(path='a.png', bytes=picture(i)) for i in range(4)]
    for name in ('train-00000-of-00002', 'train-00001-of-00002', 'validation-00000-of-00001', 'test-00000-of-00001'):
        put(tmp_path / f'src/data/{name}.parquet', b'')
        pq.write_table(pa.table(dict(image=pa.array(images + [dict(path='gone.png', bytes=None)], struct), question=['q?'] * 5, answer=['a'] * 5)),
                       tmp_path / f'src/data/{name}.parquet')
    rows = imported('parquet', tmp_path, '--max_bad=0.3')
    assert [len(rows[split]) for split in data.SPLITS] == [8, 4, 4] and len(rejects(tmp_path)) == 4
    pq.write_table(pa.table(dict(images=pa.array([images[:2], images[:1]], pa.list_(struct)), question=['q?'] * 2, answer=[['a', 'b']] * 2)), tmp_path / 'two.parquet')
    data.main(['parquet', f"--source={tmp_path / 'two.parquet'}", f"--out={tmp_path / 'two'}", '--max_bad=0.5'])
    assert '2 pictures in one row' in (tmp_path / 'two/rejects.jsonl').read_text()


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
        pq.write_table(pa.table(dict(image_bytes=[picture(k), picture(k + 1)], caption=['A red bus.', 'A dog.'], id=[f'{k}', f'{k + 1}'], image_url=['u', 'v'])),
                       tmp_path / f'src/pixmo_{split}.parquet')
        put(tmp_path / f'qa/pixmo_qa_mixed_{split}.parquet', b'')
        pq.write_table(pa.table(dict(image_url=['u', 'v'], image_sha256=[None, 'x'], image_bytes=[picture(k), picture(k + 1)], source=['pixmo-cap-qa'] * 2,
                                     question=['[USER] What is it? [ASSISTANT]', '[USER] Hi? [ASSISTANT] Hello. [USER] And now? [ASSISTANT]'], answer=['a bus', 'bye'])),
                       tmp_path / f'qa/pixmo_qa_mixed_{split}.parquet')
    rows = imported('parquet', tmp_path)
    assert [list(rows[split].sample_id) for split in data.SPLITS] == [['0', '1'], ['10', '11'], ['20', '21']] and list(rows['val'].caption) == ['A red bus.', 'A dog.']
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
    rows = {split: read_rows(tmp_path / 'out', split) for split in data.SPLITS}
    assert sum(map(len, rows.values())) == 30 and rows['train'].question[0] == 'what, "exactly"?'
    assert [(r['sample_id'], r['reason'].split(':')[0]) for r in rejects(tmp_path)] == [
        ('mine.csv-30', 'there is no image file'), ('mine.csv-31', 'the answer is empty or no text'), ('mine.csv-32', "the image path '../secret.png' leaves the folder")]
    for split in ('train', 'val', 'test'):
        put(tmp_path / f'own/{split}.jsonl', '\n'.join(json.dumps(line) for line in (
            dict(image='p1.png', question='q?', answer=['a', 'b']), dict(image='p2.png', caption='a bird'), dict(image='p3.png', question='q?', answer=7), [1])))
    data.main(['table', f"--source={tmp_path / 'own'}", f"--images={tmp_path / 'src'}", f"--out={tmp_path / 'own_out'}", '--max_bad=0.5'])
    rows = read_rows(tmp_path / 'own_out', 'val')
    assert list(rows.references) == [['a', 'b'], ['a bird']] and list(rows.type) == ['all', 'describe']
    put(tmp_path / 'bad.jsonl', '{"image": \n')
    with pytest.raises(ValueError, match='bad.jsonl, line 1: not JSON'):
        data.main(['table', f"--source={tmp_path / 'bad.jsonl'}", f"--out={tmp_path / 'never'}"])


def test_sortofclevr(tmp_path, tiny_encoder, capsys):
    """Every answer follows from the pixels, read here without the generator's scenes; one seed draws the same bytes whatever the other splits' sizes are, and no
    picture twice; answers are balanced; the dataset trains, its two types are reported, and it needs no --source."""
    sizes = dict(train=60, val=8, test=8)
    def draw(name, *flags):
        data.main(['sortofclevr', f'--out={tmp_path / name}', *[f'--n_{split}={n}' for split, n in sizes.items()], *flags])
        return [(tmp_path / name / f'{split}.parquet').read_bytes() for split in data.SPLITS]
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
    names = [prepare.split_of(None, str(i).encode()) for i in range(4000)]
    assert 320 < names.count('val') < 490 and 320 < names.count('test') < 490
    assert {prepare.split_of('train or val', str(i).encode()) for i in range(99)} == {'train', 'val'} and prepare.split_of('test', b'1') == 'test'
    assert [prepare.split_of_name(n) for n in ('train-00000-of-00005.parquet', 'pixmo_qa_mixed_val.parquet', 'validation.csv', '00000.parquet', 'contest.jsonl')] == [
        'train', 'val', 'val', None, None]


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_fuzz(tmp_path):
    """Hundreds of mutated files, at the picture reader and at every importer: each is used or refused with a reason, none ends in another error."""
    from encoder import open_picture
    rng = random.Random(0)

    def mutated(content):
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

    seeds = [picture(i, form=form, mode=mode) for i, (form, mode) in enumerate(
        [('PNG', 'RGB'), ('PNG', 'P'), ('JPEG', 'RGB'), ('JPEG', 'L'), ('GIF', 'P'), ('WEBP', 'RGB'), ('BMP', 'RGB'), ('TIFF', 'RGB'), ('PPM', 'RGB'), ('PNG', 'RGBA')])]
    opened = 0
    for i in range(400):
        try:
            open_picture(mutated(seeds[i % len(seeds)]))
            opened += 1
        except ValueError:
            pass
    assert 0 < opened < 400
    put(tmp_path / 'a.parquet', b'')
    pq.write_table(pa.table(dict(image=[picture(1)], question=['q'], answer=['a'])), tmp_path / 'a.parquet')
    files = {'parquet': (tmp_path / 'a.parquet').read_bytes(), 'csv': b'image,question,answer\np.png,q?,a\n', 'jsonl': b'{"image": "p.png", "question": "q?", "answer": "a"}\n'}
    put(tmp_path / 'p.png', picture(1))
    for i in range(90):
        kind = list(files)[i % 3]
        put(tmp_path / f'f.{kind}', mutated(files[kind]))
        try:
            data.main(['parquet' if kind == 'parquet' else 'table', f'--source={tmp_path}/f.{kind}', f'--out={tmp_path}/o{i}', '--max_bad=1'])
        except (ValueError, FileNotFoundError):
            pass
        if kind == 'parquet':
            put(tmp_path / 'd/train.parquet', (tmp_path / 'f.parquet').read_bytes())
            try:
                read_rows(tmp_path / 'd', 'train')
            except ValueError:
                pass


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
            self.send_header('Location', {'/moved': '/ok', '/loop': '/loop', '/file': 'file:///etc/passwd', '/inside': 'http://10.0.0.1/x'}[path])
            self.end_headers()
            return
        if path == '/slow':
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b'x')
                    time.sleep(.05)
            except OSError:
                pass
            return
        if path == '/reset':
            self.connection.close()
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(body) + 99 * (path == '/cut')))
        self.end_headers()
        if path == '/html':
            body = b'<html>This photo is unavailable</html>'.ljust(len(body))
        if path == '/huge':
            body = body * 50
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
    fates = {'/ok': '', '/ok?a=1': '', '/busy': '', '/moved': '', '/gone': 'status 404', '/broken': 'status 503', '/loop': 'more than 5 redirects',
             '/file': 'neither http nor https', '/slow': 'timed out', '/reset': 'no connection', '/cut': 'cut off', '/html': 'not a picture',
             '/huge': '', '/other': 'another picture than it was (sha256)'}
    urls = [server + path for path in fates] + ['ftp://x/y', 'http://', 'no url']
    put(tmp_path / 'src/train-00000-of-00001.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls, image_sha256=[sha if 'o' in u[-5:] and u.endswith(('/ok', '/other')) else None for u in urls],
                                 question=['What?'] * len(urls), answer=['a bus'] * len(urls))), tmp_path / 'src/train-00000-of-00001.parquet')
    rows = imported('pixmo', tmp_path, f"--images={tmp_path / 'pics'}", *FLAGS)
    text = capsys.readouterr().out
    manifest = {e['url']: e['reason'] for e in map(json.loads, (tmp_path / 'pics/manifest.jsonl').read_text().splitlines())}
    assert {path: manifest[server + path] for path in fates} == fates | {'/reset': manifest[server + '/reset']}
    assert manifest[server + '/reset'] in ('no connection', 'not HTTP')
    assert manifest['ftp://x/y'] == 'neither http nor https' and manifest['http://'] == 'not a URL' and manifest['no url'] == 'neither http nor https'
    assert '17 pictures asked for, 5 there, 12 not' in text
    assert sum(map(len, rows.values())) == 5 and len(rejects(tmp_path)) == 12 and all(r['missing'] for r in rejects(tmp_path))
    assert Server.asked['/busy'] == 3 and Server.asked['/broken'] == 3 and Server.asked['/gone'] == 1
    before = dict(Server.asked)
    again = ['pixmo', f"--source={tmp_path / 'src'}", f"--images={tmp_path / 'pics'}", *FLAGS]
    data.main([*again, f"--out={tmp_path / 'out2'}"])
    assert Server.asked == before
    data.main([*again, f"--out={tmp_path / 'out3'}", '--retry_failed=true'])
    assert Server.asked['/gone'] == 2 and Server.asked['/ok'] == before['/ok']


def test_fetch_limits(tmp_path, server):
    """Files over most_bytes are refused; so are private addresses, also behind a redirect, unless they are allowed."""
    def fate(path, **options):
        config = prepare.ImportConfig(source='x', out='y', timeout_s=1., retries=0, **options)
        try:
            return len(pixmo.get(server + path, config))
        except pixmo.Failed as e:
            return str(e)
    assert fate('/huge', allow_private=True, most_bytes=1000) == 'more than 1000 bytes' or fate('/huge', allow_private=True, most_bytes=1000) == len(Server.good)
    assert fate('/ok', allow_private=True, most_bytes=100) == 'more than 100 bytes'
    assert fate('/ok') == 'a private address'
    for host in ('localhost', '[::1]', '0.0.0.0', '169.254.169.254', '10.1.2.3', '[::ffff:127.0.0.1]'):
        with pytest.raises(pixmo.Failed, match='a private address|no connection'):
            pixmo.get(f'http://{host}/x', prepare.ImportConfig(source='x', out='y', retries=0, timeout_s=1.))


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
    """cap-qa with messages of several turns, and counts."""
    urls = [f'{server}/ok?{i}' for i in range(3)]
    put(tmp_path / 'src/train-00000.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls[:1], question=['[USER] Hi [ASSISTANT]'], answer=['x'], messages=[['Hi', 'x', 'More?', 'No.']])), tmp_path / 'src/train-00000.parquet')
    put(tmp_path / 'src/count/test-0.parquet', b'')
    pq.write_table(pa.table(dict(image_url=urls[1:], count=pa.array([3, 0], pa.int32()), label=['cats', 'dogs'], points=[None, None])), tmp_path / 'src/count/test-0.parquet')
    rows = imported('pixmo', tmp_path, f"--images={tmp_path / 'pics'}", *FLAGS)
    everything = sorted((q, r[0]) for split in rows.values() for q, r in zip(split.question, split.references))
    assert everything == [('Hi', 'x'), ('How many cats are there?', '3'), ('How many dogs are there?', '0'), ('More?', 'No.')]
    assert list(rows['test'].question) == ['How many cats are there?', 'How many dogs are there?']
