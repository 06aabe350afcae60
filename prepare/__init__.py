"""
Importing published datasets. A module of this folder reads one family of formats: its rows(config) yields
(split, row), and what is here checks the rows and writes them.

    split   train, val or test; 'train or val', or None for any of the three: then the content of the picture
    decides. Published splits come first row     image (bytes, or a path), question, answer (a string or a
    list), caption, sample_id, type, as in data.py;
            or sample_id and bad (why the row cannot be used), or sample_id and missing (why there is no
            picture), which is not counted as bad

A module that draws its pictures has a Config of its own in place of ImportConfig; its rows have their split
and are not checked.
"""

import hashlib
import json
import re
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from os.path import normpath
from pathlib import Path

import pyarrow as pa

from plumbing.files import write_whole
from plumbing.pictures import open_picture
from plumbing.tables import (
    SCHEMA,
    SPLITS,
    KnownPictures,
    OnDisk,
    caption_problem,
    read_file,
    text_problem,
    write_dataset,
)


def formats():
    """The names of the modules, which are the formats that `python data.py FORMAT` takes."""
    return sorted(path.stem for path in Path(__file__).parent.glob('[!_]*.py'))


@dataclass
class ImportConfig:
    source: str = ''  # folder or file of the published dataset
    images: str = ''  # folder of its pictures, where they lie apart
    out: str = ''  # folder to write the dataset to
    max_bad: float = 0.01  # stop where more than this share of the rows cannot be used; 0: where any cannot
    # fetching pictures by URL
    workers: int = 32  # connections at a time
    timeout_s: float = 20.0  # for a picture, in seconds
    retries: int = 3  # after a lost connection, a time-out, status 429 or 5xx
    backoff_s: float = 1.0  # pause before the first of them, doubled for each
    most_bytes: int = 2**25  # a larger file is refused
    allow_private: bool = False  # fetch from addresses of the own network too
    retry_failed: bool = False  # ask again for what failed in an earlier run

    def __post_init__(self):
        for key in ('source', 'out'):
            if not getattr(self, key):
                raise ValueError(
                    f'--{key} is needed: --source=FOLDER of the published files, --out=FOLDER to write'
                )
        for key in ('workers', 'timeout_s', 'most_bytes'):
            if getattr(self, key) <= 0:
                raise ValueError(f'{key}={getattr(self, key)}: expected more than 0')
        for key in ('retries', 'backoff_s'):
            if getattr(self, key) < 0:
                raise ValueError(f'{key}={getattr(self, key)}: expected 0 or more')
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f'max_bad={self.max_bad}: expected a share, 0 to 1')


def import_dataset(module, config):
    """Writes a published dataset as a dataset folder; what cannot be used is listed in its rejects.jsonl,
    with reasons.

    Raises: ValueError where more than `config.max_bad` of the rows are bad; their list is then beside
        `config.out`.
    """
    rejects, known, n, reasons, written, first, shared = (
        OnDisk(),
        KnownPictures(),
        Counter(),
        Counter(),
        Counter(),
        [],
        [],
    )

    def reject(row, kind, reason):
        n[kind] += 1
        reasons[re.sub(r"(?s) '.*'|(: | \().*", '', reason)] += 1  # its kind, without the details
        rejects.append(dict(sample_id=row.get('sample_id'), reason=reason, missing=kind == 'missing'))
        if kind == 'bad' and len(first) < 3:
            first.append(f'{row.get("sample_id")}: {reason}')

    def good_rows():
        with ThreadPoolExecutor() as pool:
            rows = iter(module.rows(config))
            while chunk := list(islice(rows, 256)):
                files = list(pool.map(partial(picture_file, config=config), chunk))
                new = {
                    digest: picture
                    for picture, digest, problem in files
                    if not problem and known.get(digest) is None
                }
                for digest, problem in zip(new, pool.map(decoding_problem, new.values())):
                    known[digest] = problem, None
                for (split, row), (picture, digest, problem) in zip(chunk, files):
                    n['rows'] += 1
                    undecodable, earlier = known.get(digest) or (None, None)
                    place = split_of(split, digest, earlier) if digest else None
                    if row.get('missing'):
                        reject(row, 'missing', row['missing'])
                    elif problem or undecodable:
                        reject(row, 'bad', problem or undecodable)
                    elif place is None:
                        reject(row, 'bad', 'its picture is in the test split too')
                    else:
                        if earlier is None:
                            known[digest] = None, place
                        elif earlier != place:
                            n['shared'] += 1
                            shared.extend(
                                [f'{row.get("sample_id")} of {place} is in {earlier}'] * (not shared)
                            )
                        written[place] += 1
                        yield place, row | dict(image=picture, **texts(row))

    def write_rejects(file):
        file.writelines(json.dumps(r).encode() + b'\n' for r in rejects)

    def finish(folder):
        allowed = n['bad'] <= config.max_bad * n['rows']
        path = (
            folder / 'rejects.jsonl'
            if allowed
            else Path(config.out).with_name(f'{Path(config.out).name}.rejects.jsonl')
        )
        write_whole(path, write_rejects)
        print(
            f"{n['rows']} rows read, {n['rows'] - len(rejects)} written, {n['missing']} without a picture, "
            f"{n['bad']} bad"
            + ''.join(f' | {count} {reason}' for reason, count in reasons.most_common(9))
        )
        if shared:
            print(
                f"{n['shared']} rows have a picture that another split has too; splits are kept as they were "
                f"published: {shared[0]}, for example"
            )
        if lacking := [split for split in SPLITS if not written[split]]:
            print(
                f'no rows for {" and ".join(lacking)}: to train takes some in each split; more pictures, or '
                f'files named train, val and test, give them'
            )
        if not allowed:
            raise ValueError(
                f"{config.source}: {n['bad']} of {n['rows']} rows cannot be used, more than "
                f"--max_bad={config.max_bad} allows: "
                f"{'; '.join(first)}; all of them are in {path}"
            )

    write_dataset(config.out, good_rows(), SCHEMA.set(2, pa.field('answer', pa.list_(pa.string()))), finish)


def picture_file(split_row, config):
    """-> a row's picture file as bytes, their sha256, and what is wrong with the row before the picture is
    decoded, or None."""
    row = split_row[1]
    picture, caption = row.get('image'), row.get('caption')
    if row.get('missing') or row.get('bad'):
        return None, b'', row.get('bad')
    if isinstance(picture, (str, Path)):
        inside = any(
            Path(normpath(picture)).is_relative_to(normpath(folder))
            for folder in (config.images, config.source)
            if folder
        )
        picture = read_file(picture) if inside else f'the image path leaves the folder: {picture}'
    if not isinstance(picture, bytes) or not picture:
        return None, b'', picture if isinstance(picture, str) else 'the image is empty'
    problem = None
    if row.get('question') is not None or not (isinstance(caption, str) and caption.strip()):
        problem = text_problem(row.get('question'), texts(row)['answer'])
    return picture, hashlib.sha256(picture).digest(), problem or caption_problem(caption)


def plain(value):
    """A value as text that can be printed, or None."""
    return None if value is None else str(value).encode(errors='replace').decode()


def texts(row):
    """Texts of a row as they are written: the answers as a list, its name and type as what can be printed."""
    return dict(
        answer=[row['answer']] if isinstance(row.get('answer'), str) else row.get('answer'),
        sample_id=plain(row.get('sample_id')),
        type=plain(row.get('type')),
    )


def decoding_problem(picture):
    """Why a picture file cannot be decoded, or None."""
    try:
        open_picture(picture)
    except ValueError as e:
        return str(e)


def split_of(split, digest, earlier=None):
    """Where a row goes. A published split is kept. Else the sha256 of the picture decides, the same for all
    its questions, whatever else there is, but that a picture which was in another split `earlier` stays
    there; None where that is a published test split and the row is for training."""
    if split in SPLITS:
        return split
    if earlier:
        return earlier if split is None or earlier != 'test' else None
    return 'val' if digest[0] < 26 else 'test' if digest[0] < 52 and split is None else 'train'


def split_of_path(path, source):
    """The split that a file's name tells, else the names of its folders below `source`, or None."""
    names = path.relative_to(source).parts or [path.name]
    return next(filter(None, map(split_of_name, reversed(names))), None)


def published_first(files, source):
    """[(file, split or None)] in order: the split that a file's name tells, else the names of its folders
    below `source`; files that tell one come first, so that the pictures of the others keep out of theirs.
    Where all tell one, but none test, or none val, what is for training is divided, and this is said."""
    splits = {path: split_of_path(path, source) for path in files}
    lacking = [split for split in ('val', 'test') if split not in splits.values()]
    if lacking and 'train' in splits.values() and None not in splits.values():
        print(
            f'{source}: no file is named after {" or ".join(lacking)}: rows for training are divided, by the '
            f'content of their pictures'
        )
        splits = {
            path: (None if 'test' in lacking else 'train or val') if split == 'train' else split
            for path, split in splits.items()
        }
    return sorted(splits.items(), key=lambda both: (both[1] not in SPLITS, both[0]))


def split_of_name(name):
    """The split that a file's name tells, or None."""
    words = re.split(r'[^a-z]+', name.lower())
    return next(
        (
            split
            for split, names in dict(
                train=('train', 'training'),
                val=('val', 'valid', 'validation', 'dev'),
                test=('test', 'testing'),
            ).items()
            if set(names) & set(words)
        ),
        None,
    )


def turns(question, answer, messages=None):
    """Yields (question, answer) for every turn of a talk: of `messages`, user and assistant by turns, else of
    a question with [USER] and [ASSISTANT] tags, whose last turn the answer answers."""
    if not messages and isinstance(question, str) and re.search(r'\[(USER|ASSISTANT)\]', question):
        parts = [part.strip() for part in re.split(r'\[(?:USER|ASSISTANT)\]', question)]
        messages = [part for i, part in enumerate(parts) if part or 0 < i < len(parts) - 1] + [answer]
    if not isinstance(messages, list) or not messages:
        yield question, answer
    else:
        yield from zip_longest(
            messages[::2], messages[1::2]
        )  # a question without an answer becomes a bad row


def read_json(path, key=None):
    """Yields the items of the list, or the (key, value) pairs of the object, in a JSON file or in a key of
    it, reading a piece of the file at a time.
    Raises: FileNotFoundError; ValueError where the file is not JSON, or not of this form."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'{path}: no such file; --source is the folder of the published files, see prepare/'
        )
    with open(path, encoding='utf-8') as f:
        pieces = Pieces(f)
        try:
            if key is None:
                yield from pieces.items()
            elif pieces.peek() != '{' or not (yield from pieces.items_of(key)):
                raise ValueError(f'there is no list {key!r}')
        except (ValueError, RecursionError) as e:
            raise ValueError(f'{path}: not JSON of the published form: {e}') from None


class Pieces:
    """JSON values one after the other from a file of which only a piece is in memory."""

    def __init__(self, file):
        self.file, self.text, self.i, self.decoder = file, '', 0, json.JSONDecoder()

    def more(self):
        new = self.file.read(max(2**20, len(self.text)))
        self.text, self.i = self.text[self.i :] + new, 0
        return new

    def peek(self):
        """The next sign behind white space, '' at the end."""
        while True:
            self.i = re.compile(r'[ \t\n\r]*').match(self.text, self.i).end()
            if self.i < len(self.text) or not self.more():
                return self.text[self.i : self.i + 1]

    def take(self, signs):
        if (sign := self.peek()) not in signs or not sign:
            raise ValueError(f'{sign or "the end"} where one of {signs} was expected')
        self.i += 1
        return sign

    def value(self):
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.i)
            except ValueError:
                if not self.more():
                    raise
            else:
                if self.text[end : end + 1].strip('.eE'):
                    self.i = end
                    return value
                if not self.more():  # else a number may go on
                    self.i = len(self.text)
                    return value

    def items(self):
        """Yields the items of the list, or the pairs of the object, that comes next."""
        sign = self.take('[{')
        close = ']' if sign == '[' else '}'
        while self.peek() != close:
            value = self.value()
            if sign == '{':
                self.take(':')
                value = value, self.value()
            yield value
            if self.peek() != close:
                self.take(',')
        self.take(close)

    def items_of(self, wanted):
        """The same of one key of the object that comes next -> whether it is there."""
        self.take('{')
        while self.peek() != '}':
            key = self.value()
            self.take(':')
            if key == wanted:
                yield from self.items()
                return True
            self.value()
            if self.peek() != '}':
                self.take(',')


def sorted_on_disk(keyed):
    """Yields the values of (key, value) pairs in the order of their keys, each of two numbers or strings, by
    way of a temporary file."""
    table = sqlite3.connect('', isolation_level=None)
    table.execute('CREATE TABLE pairs (a, b, value)')
    table.execute('BEGIN')
    table.executemany(
        'INSERT INTO pairs VALUES (?, ?, ?)', ((a, b, json.dumps(value)) for (a, b), value in keyed)
    )
    for (value,) in table.execute('SELECT value FROM pairs ORDER BY a, b, rowid'):
        yield json.loads(value)


def read_json_lines(path):
    """Yields the value of every line, or a ValueError that says why there is none. Raises:
    FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'{path}: no such file; --source is the folder of the published files, see prepare/'
        )
    with open(path, 'rb') as f:
        for i, line in enumerate(f):
            try:
                if line.strip():
                    yield json.loads(line.decode('utf-8-sig'))
            except (ValueError, RecursionError) as e:
                yield ValueError(f'not JSON in UTF-8: line {i + 1}: {e}')


def number(i, value):
    return i


def published(path, values, make, name=number):
    """Yields the rows that make(value) yields for every value of a file; a value of another form than the
    published one becomes a bad row, called after the file and `name` of its number and itself."""
    for i, value in enumerate(values):
        try:
            if isinstance(value, ValueError):
                raise value
            made = list(make(value))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            made = [
                (
                    None,
                    dict(
                        bad=f'not of the published form: {type(e).__name__} {e}',
                        sample_id=f'{Path(path).name}-{name(i, value)}',
                    ),
                )
            ]
        yield from made
