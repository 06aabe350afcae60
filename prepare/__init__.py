"""
Importing published datasets. A module of this folder reads one family of formats: its rows(config) yields (split, row), and what is here checks
the rows and writes them.

    split   train, val or test; 'train or val', or None for any of the three: then the content of the picture decides
    row     image (bytes, or a path), question, answer (a string or a list), caption, sample_id, type, as in data.py;
            or sample_id and bad (why the row cannot be used), or sample_id and missing (why there is no picture), which is not counted as bad

A module that draws its pictures has a Config of its own in place of ImportConfig; its rows have their split and are not checked.
"""

import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa

from data import SCHEMA, text_problem, write_dataset
from encoder import open_picture


def formats():
    """The names of the modules, which are the formats that `python data.py FORMAT` takes."""
    return sorted(path.stem for path in Path(__file__).parent.glob('[!_]*.py'))


@dataclass
class ImportConfig:
    source: str = ''              # folder or file of the published dataset
    images: str = ''              # folder of its pictures, where they lie apart
    out: str = ''                 # folder to write the dataset to
    max_bad: float = 0.01         # stop where more than this share of the rows cannot be used; 0: where any cannot
    # fetching pictures by URL
    workers: int = 32             # connections at a time
    timeout_s: float = 20.0       # for a picture, in seconds
    retries: int = 3              # after a lost connection, a time-out, status 429 or 5xx
    backoff_s: float = 1.0        # pause before the first of them, doubled for each
    most_bytes: int = 2 ** 25     # a larger file is refused
    allow_private: bool = False   # fetch from addresses of the own network too
    retry_failed: bool = False    # ask again for what failed in an earlier run

    def __post_init__(self):
        for key in ('source', 'out'):
            if not getattr(self, key):
                raise ValueError(f'--{key} is needed: --source=FOLDER of the published files, --out=FOLDER to write')
        for key in ('workers', 'timeout_s', 'most_bytes'):
            if getattr(self, key) <= 0:
                raise ValueError(f'{key}={getattr(self, key)}: expected more than 0')
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f'max_bad={self.max_bad}: expected a share, 0 to 1')


def import_dataset(module, config):
    """Writes a published dataset as a dataset folder; what cannot be used is listed in its rejects.jsonl, with reasons.

    Raises: ValueError where more than `config.max_bad` of the rows are bad; their list is then beside `config.out`.
    """
    rejects, n = [], Counter()

    def good_rows():
        with ThreadPoolExecutor() as pool:
            rows, pictures = iter(module.rows(config)), {}
            while chunk := list(islice(rows, 256)):
                for (split, row), (picture, problem) in zip(chunk, pool.map(partial(checked, pictures=pictures), chunk)):
                    missing = row.get('missing')
                    n['rows'] += 1
                    if missing or problem:
                        n['missing' if missing else 'bad'] += 1
                        rejects.append(dict(sample_id=row.get('sample_id'), reason=missing or problem, missing=bool(missing)))
                    else:
                        answer = [row['answer']] if isinstance(row.get('answer'), str) else row.get('answer')
                        yield split_of(split, picture), row | dict(image=picture, answer=answer)

    def finish(folder):
        counts = Counter(r['reason'].split(':')[0] for r in rejects)
        first = '; '.join(f'{r["sample_id"]}: {r["reason"]}' for r in [r for r in rejects if not r['missing']][:3])
        allowed = n['bad'] <= config.max_bad * n['rows']
        path = folder / 'rejects.jsonl' if allowed else Path(config.out).with_name(f'{Path(config.out).name}.rejects.jsonl')
        path.write_text(''.join(json.dumps(r) + '\n' for r in rejects))
        print(f"{n['rows']} rows read, {n['rows'] - len(rejects)} written, {n['missing']} without a picture, {n['bad']} bad"
              + ''.join(f' | {count} {reason}' for reason, count in counts.most_common(9)))
        if not allowed:
            raise ValueError(f"{config.source}: {n['bad']} of {n['rows']} rows cannot be used, more than --max_bad={config.max_bad} allows: {first}; all of "
                             f'them are in {path}')

    write_dataset(config.out, good_rows(), SCHEMA.set(2, pa.field('answer', pa.list_(pa.string()))), finish)


def checked(split_row, pictures):
    """A row's picture file as bytes, and what is wrong with the row, or None. `pictures` remembers those that were decoded before."""
    row = split_row[1]
    picture, caption, answer = row.get('image'), row.get('caption'), row.get('answer')
    if row.get('missing') or row.get('bad'):
        return None, row.get('bad')
    if isinstance(picture, (str, Path)):
        if not Path(picture).is_file():
            return None, f'there is no image file: {picture}'
        picture = Path(picture).read_bytes()
    if not isinstance(picture, bytes) or not picture:
        return None, 'the image is empty'
    if row.get('question') is not None or not (isinstance(caption, str) and caption.strip()):
        if problem := text_problem(row.get('question'), [answer] if isinstance(answer, str) else answer):
            return picture, problem
    digest = hashlib.sha256(picture).digest()
    if digest not in pictures:
        try:
            open_picture(picture)
            pictures[digest] = None
        except ValueError as e:
            pictures[digest] = str(e)
    return picture, pictures[digest]


def split_of(split, picture):
    """A split that is not fixed follows from the content of the picture: the same for all its questions, whatever else there is."""
    first = hashlib.sha256(picture).digest()[0]
    if split == 'train or val':
        return 'val' if first < 26 else 'train'
    return split or ('val' if first < 26 else 'test' if first < 52 else 'train')


def split_of_name(name):
    """The split that a file's name tells, or None."""
    words = re.split(r'[^a-z]+', name.lower())
    return next((split for split, names in dict(train=('train', 'training'), val=('val', 'valid', 'validation', 'dev'), test=('test', 'testing')).items()
                 if set(names) & set(words)), None)


def turns(question, answer, messages=None):
    """Yields (question, answer) for every turn of a talk: of `messages`, user and assistant by turns, else of a question with [USER] and
    [ASSISTANT] tags, whose last turn the answer answers."""
    if not messages and isinstance(question, str) and re.search(r'\[(USER|ASSISTANT)\]', question):
        parts = [part.strip() for part in re.split(r'\[(?:USER|ASSISTANT)\]', question)]
        messages = [part for i, part in enumerate(parts) if part or 0 < i < len(parts) - 1] + [answer]
    if not messages:
        yield question, answer
    else:
        yield from zip(messages[::2], messages[1::2])


def read_json(path):
    """Raises: FileNotFoundError; ValueError where the file is not JSON."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; --source is the folder of the published files, see prepare/')
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{path}: not JSON: {e}') from None


def read_json_lines(path):
    """Yields the value of every line. Raises: as `read_json`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; --source is the folder of the published files, see prepare/')
    with open(path, 'rb') as f:
        for i, line in enumerate(f):
            try:
                if line.strip():
                    yield json.loads(line.decode('utf-8-sig'))
            except ValueError as e:
                raise ValueError(f'{path}, line {i + 1}: not JSON: {e}') from None
