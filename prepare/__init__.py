"""
Importing published datasets. A module of this folder reads one family of formats: its rows(config) yields
(split, row), and what is here checks the rows and writes them.

    split   train, val or test: as it was published; 'train or val', or None for any of the three: the content
            of the picture decides. Published splits come first
    row     image (bytes, or a path), question, answer (a string or a list), caption, sample_id, type, as in
            data.py; or sample_id and bad (why the row cannot be used); or sample_id and missing (why there is
            no picture), which is not counted as bad

A module that draws its pictures has a Config of its own in place of ImportConfig; its rows have their split
and are not checked. A new format is a new module: nothing else names them.
"""

import hashlib
import json
import mmap
import os
import re
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from os.path import normpath
from pathlib import Path

import pyarrow as pa

from plumbing.files import write_whole
from plumbing.pictures import rgb_picture
from plumbing.tables import (
    OTHER_FOLDER,
    SCHEMA,
    SPLITS,
    KnownPictures,
    OnDisk,
    caption_problem,
    read_file,
    temporary_problem,
    temporary_table,
    text_problem,
    write_dataset,
)

CHUNK_BYTES = 2**26  # of different pictures that are read ahead


def formats():
    """The names of the modules, which are the formats that `python data.py FORMAT` takes."""
    return sorted(path.stem for path in Path(__file__).parent.glob('[!_]*.py'))


@dataclass
class ImportConfig:
    source: str = ''              # folder or file of the published dataset
    images: str = ''              # folder of its pictures, where they lie apart
    out: str = ''                 # folder to write the dataset to
    max_bad: float = 0.01         # stop where more than this share of the rows is bad; 0: where any is
    # fetching pictures by URL
    workers: int = 32             # connections at a time
    timeout_s: float = 20.0       # for a picture, in seconds
    retries: int = 3              # after a lost connection, a time-out, status 429 or 5xx
    backoff_s: float = 1.0        # pause before the first of them, doubled for each
    most_bytes: int = 2**25       # a larger file is refused
    allow_private: bool = False   # fetch from addresses of the own network too
    retry_failed: bool = False    # ask again for what failed in an earlier run

    def __post_init__(self):
        for key in ('source', 'out'):
            if not getattr(self, key):
                raise ValueError(f'--{key} is needed: --source=FOLDER of the published files, '
                                 f'--out=FOLDER to write')
        for key in ('workers', 'timeout_s', 'most_bytes'):
            if getattr(self, key) <= 0:
                raise ValueError(f'{key}={getattr(self, key)}: expected more than 0')
        for key in ('retries', 'backoff_s'):
            if getattr(self, key) < 0:
                raise ValueError(f'{key}={getattr(self, key)}: expected 0 or more')
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f'max_bad={self.max_bad}: expected a share, 0 to 1')


# ----------------------------------------------------------------------------
# checking and writing the rows


def import_dataset(module, config):
    """Writes a published dataset as a dataset folder; what cannot be used is listed in its rejects.jsonl,
    with reasons.

    Raises: ValueError where more than `config.max_bad` of the rows are bad; their list is then beside
        `config.out`.
    """
    job = Import(module, config)
    schema = SCHEMA.set(2, pa.field('answer', pa.list_(pa.string())))  # an answer is a list of references
    write_dataset(config.out, job.good_rows(), schema, job.finish)


class Import:
    """One import, and what it has met so far."""

    def __init__(self, module, config):
        self.module = module
        self.config = config
        self.known = KnownPictures()  # of a picture: (why it cannot be decoded or None, its split or None)
        self.counts = Counter()       # rows that were read, are missing, bad or shared
        self.written = Counter()      # rows by split
        self.rejects = OnDisk()
        self.reasons = Counter()      # how often each kind of reason was met
        self.first_bad = []           # up to three, for the message
        self.first_shared = None      # a row whose picture another split has

    def good_rows(self):
        """Yields (split, row) for every row that can be used; reads and decodes pictures on all cores."""
        with ThreadPoolExecutor() as pool:
            for chunk in chunks(self.module.rows(self.config)):
                # a picture that several rows name, or hold, is read once and held once
                images = list(dict.fromkeys(image_of(row) for _, row in chunk))
                files = dict(zip(images, pool.map(partial(picture_file, config=self.config), images)))
                self.decode_new(files.values(), pool)
                for split, row in chunk:
                    picture, digest, why_none = files[image_of(row)]
                    problem = row.get('bad') or why_none or texts_problem(row)
                    place = self.place_of(split, row, digest, problem)
                    if place:
                        yield place, row | dict(image=picture, **texts(row))

    def decode_new(self, files, pool):
        """Decodes each picture once, however many questions it has."""
        new = {}
        for picture, digest, why_none in files:
            if not why_none and self.known.get(digest) is None:
                new[digest] = picture
        for digest, problem in zip(new, pool.map(decoding_problem, new.values())):
            self.known[digest] = problem, None

    def place_of(self, split, row, digest, problem):
        """The split that a row is written to, or None where it is rejected."""
        self.counts['rows'] += 1
        undecodable, earlier = self.known.get(digest) or (None, None)
        if row.get('missing'):
            return self.reject(row, 'missing', row['missing'])
        if problem or undecodable:
            return self.reject(row, 'bad', problem or undecodable)
        place = split_of(split, digest, earlier)
        if place is None:
            return self.reject(row, 'bad', 'its picture is in the test split too')
        if earlier is None:
            self.known[digest] = None, place
        elif earlier != place:
            self.counts['shared'] += 1
            self.first_shared = self.first_shared or f'{row.get("sample_id")} of {place} is in {earlier}'
        self.written[place] += 1
        return place

    def reject(self, row, kind, reason):
        self.counts[kind] += 1
        self.reasons[re.sub(r"(?s) '.*'|(: | \().*", '', reason)] += 1  # its kind, without the details
        self.rejects.append(dict(sample_id=row.get('sample_id'), reason=reason, missing=kind == 'missing'))
        if kind == 'bad' and len(self.first_bad) < 3:
            self.first_bad.append(f'{row.get("sample_id")}: {reason}')

    def finish(self, folder):
        """Adds rejects.jsonl to the folder and says what became of the rows. Raises: ValueError."""
        n_rows = self.counts['rows']
        n_bad = self.counts['bad']
        allowed = n_bad <= self.config.max_bad * n_rows
        out = Path(self.config.out)
        path = folder / 'rejects.jsonl'
        if not allowed:  # the folder will not be there
            path = out.with_name(f'{out.name}.rejects.jsonl')
        write_whole(path, self.write_rejects)
        print(f"{n_rows} rows read, {n_rows - len(self.rejects)} written, {self.counts['missing']} without a "
              f"picture, {n_bad} bad", end='')
        print(''.join(f' | {count} {reason}' for reason, count in self.reasons.most_common(9)))
        if self.first_shared:
            print(f"{self.counts['shared']} rows have a picture that another split has too; splits are kept "
                  f"as they were published: {self.first_shared}, for example")
        lacking = [split for split in SPLITS if not self.written[split]]
        if lacking:
            print(f'no rows for {" and ".join(lacking)}: to train takes some in each split; more pictures, '
                  f'or files named train, val and test, give them')
        if not allowed:
            raise ValueError(f'{self.config.source}: {n_bad} of {n_rows} rows cannot be used, more than '
                             f'--max_bad={self.config.max_bad} allows: {"; ".join(self.first_bad)}; all of '
                             f'them are in {path}')

    def write_rejects(self, file):
        for entry in self.rejects:
            file.write(json.dumps(entry).encode() + b'\n')


def chunks(rows):
    """Yields lists of (split, row): so many that all cores have work, but at most CHUNK_BYTES of different
    pictures, and one more. Rows that hold equal pictures hold the same one."""
    chunk = []
    held = {}
    n_bytes = 0
    for split, row in rows:
        image = image_of(row)
        if image not in held:
            held[image] = image
            n_bytes += size_of(image)
        chunk.append((split, row | dict(image=held[image])))
        if len(chunk) == 256 or n_bytes > CHUNK_BYTES:
            yield chunk
            chunk = []
            held = {}
            n_bytes = 0
    if chunk:
        yield chunk


def image_of(row):
    """The picture of a row, bytes or a path, or None where there is none, or nothing to do with it."""
    image = row.get('image')
    is_usable = isinstance(image, (bytes, str, Path)) and not row.get('missing') and not row.get('bad')
    return image if is_usable else None


def size_of(image):
    """The bytes of a picture that is in memory, or will be."""
    if image is None or isinstance(image, bytes):
        return len(image or b'')
    try:
        return os.stat(image).st_size
    except (OSError, ValueError):  # it is not there: reading it says so
        return 0


def picture_file(image, config):
    """-> a picture file as bytes, their sha256, and why there is none, or None. `image`: bytes, a path or
    None"""
    if isinstance(image, (str, Path)):
        image = read_inside(image, [config.images, config.source])
    if isinstance(image, str):  # why there is none
        return None, b'', image
    if not image:
        return None, b'', 'the image is empty'
    return image, hashlib.sha256(image).digest(), None


def texts_problem(row):
    """What is wrong with the texts of a row, or None."""
    caption = row.get('caption')
    has_caption = isinstance(caption, str) and caption.strip()
    problem = None
    if row.get('question') is not None or not has_caption:
        problem = text_problem(row.get('question'), texts(row)['answer'])
    return problem or caption_problem(caption)


def read_inside(path, folders):
    """The bytes of a file in one of the folders (or one of the files), or a string: why there are none. A
    published file cannot name a path that leads elsewhere; a link can."""
    path = Path(normpath(path))
    for folder in folders:
        if folder and path.is_relative_to(normpath(folder)):
            return read_file(path)
    return f'the image path leaves the folder: {path}: {OTHER_FOLDER}'


def plain(value):
    """A value as text that can be printed, or None."""
    return None if value is None else str(value).encode(errors='replace').decode()


def texts(row):
    """Texts of a row as they are written: the answers as a list, its name and type as what can be printed."""
    answer = row.get('answer')
    if isinstance(answer, str):
        answer = [answer]
    return dict(answer=answer, sample_id=plain(row.get('sample_id')), type=plain(row.get('type')))


def decoding_problem(picture):
    """Why no encoder takes a picture file, or None."""
    try:
        rgb_picture(picture)
    except ValueError as e:
        return str(e)


# ----------------------------------------------------------------------------
# splits

SPLIT_NAMES = dict(
    train=('train', 'training'), val=('val', 'valid', 'validation', 'dev'), test=('test', 'testing'))


def split_of(split, digest, earlier=None):
    """Where a row goes. A published split is kept. Else the sha256 of the picture decides, the same for all
    its questions, whatever else there is, but that a picture which was in another split `earlier` stays
    there; None where that is a published test split and the row is for training."""
    if split in SPLITS:
        return split
    if earlier == 'test' and split is not None:
        return None
    if earlier:
        return earlier
    if digest[0] < 26:  # a tenth of 256
        return 'val'
    if digest[0] < 52 and split is None:
        return 'test'
    return 'train'


def split_of_name(name):
    """The split that a file's name tells, or None."""
    words = set(re.split(r'[^a-z]+', name.lower()))
    for split, names in SPLIT_NAMES.items():
        if words & set(names):
            return split
    return None


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
        print(f'{source}: no file is named after {" or ".join(lacking)}: rows for training are divided, by '
              f'the content of their pictures')
        divided = None if 'test' in lacking else 'train or val'
        splits = {path: divided if split == 'train' else split for path, split in splits.items()}
    return sorted(splits.items(), key=lambda both: (both[1] not in SPLITS, both[0]))


# ----------------------------------------------------------------------------
# reading published files

DEEPEST = 100    # lists and objects in one another, in a JSON file
PIECE = 2**16    # bytes of a JSON file that are read at once

FIRST_HALF = rb'\\u[dD][89abAB]..'
SECOND_HALF = rb'\\u[dD][c-fC-F]..'
HALF_CHARACTER = re.compile(FIRST_HALF + b'(?!' + SECOND_HALF + b')|(?<!' + FIRST_HALF + b')' + SECOND_HALF)


def turns(question, answer, messages=None):
    """Yields (question, answer) for every turn of a talk: of `messages`, user and assistant by turns, else of
    a question with [USER] and [ASSISTANT] tags, whose last turn the answer answers."""
    if not messages and isinstance(question, str) and re.search(r'\[(USER|ASSISTANT)\]', question):
        parts = [part.strip() for part in re.split(r'\[(?:USER|ASSISTANT)\]', question)]
        inner = range(1, len(parts) - 1)  # nothing before the first tag or after the last one is no turn
        messages = [part for i, part in enumerate(parts) if part or i in inner] + [answer]
    if not isinstance(messages, list) or not messages:
        yield question, answer
    else:  # a question without an answer gets None, which makes it a bad row
        yield from zip_longest(messages[::2], messages[1::2])


def read_json(path, key=None):
    """Yields the items of the list, or the (key, value) pairs of the object, in a JSON file or in a key of
    it. Only a piece of the file is in memory.

    The file is read twice: one that is torn is refused before its first row. Needs the package ijson.
    Raises: FileNotFoundError; ValueError where the file is not JSON, or not of this form.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; --source is the folder of the published files, see '
                                f'prepare/')
    try:
        import ijson
    except ImportError:
        raise ValueError(f'{path}: to read it, pip install ijson') from None
    options = dict(use_float=True, buf_size=PIECE)
    with open(path, 'rb') as f:
        try:
            # the fast parser makes a ? of half a character; the slow one keeps it, and its row is bad
            parser = ijson.get_backend('python') if has_half_character(f) else ijson
            form = outer_form(parser.basic_parse(f, **options), key)
            f.seek(0)
            if form == 'start_array':
                yield from parser.items(f, 'item' if key is None else f'{key}.item', **options)
            elif form == 'start_map':
                yield from parser.kvitems(f, key or '', **options)
            else:
                raise ValueError('there is no list or object' + (f' {key!r}' if key else ''))
        except (ijson.JSONError, ValueError) as e:
            reason = e.args[0]
            if isinstance(reason, bytes):  # ijson quotes the file
                reason = reason.decode(errors='replace')
            reason = str(reason).splitlines()[0]
            raise ValueError(f'{path}: not JSON of the published form: {reason}') from None


def has_half_character(f):
    """Whether a JSON file has an escape like \\ud83d without the other half of its pair."""
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return HALF_CHARACTER.search(content) is not None


def outer_form(events, key):
    """The event that opens the value of a JSON file, or of a key of its object, or None; goes through all
    events. Raises: ValueError where lists lie too deep in one another: ijson then takes memory without
    end."""
    form = None
    depth = 0
    is_wanted = key is None  # whether the next event opens the value
    for event, value in events:
        if is_wanted:
            form = event
        is_wanted = event == 'map_key' and depth == 1 and value == key
        if event in ('start_array', 'start_map'):
            depth += 1
        elif event in ('end_array', 'end_map'):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError(f'more than {DEEPEST} lists and objects in one another')
    return form


def read_json_lines(path):
    """Yields the value of every line, or a ValueError that says why there is none. Raises:
    FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; --source is the folder of the published files, see '
                                f'prepare/')
    with open(path, 'rb') as f:
        for i, line in enumerate(f):
            try:
                if line.strip():
                    yield json.loads(line.decode('utf-8-sig'))
            except (ValueError, RecursionError) as e:
                yield ValueError(f'not JSON in UTF-8: line {i + 1}: {e}')


def sorted_on_disk(keyed):
    """Yields the values of (key, value) pairs in the order of their keys, each of two numbers or strings, by
    way of a temporary file. Raises: OSError that names its folder."""
    table = temporary_table('a, b, value')
    lines = ((a, b, json.dumps(value)) for (a, b), value in keyed)
    try:
        table.executemany('INSERT INTO rows VALUES (?, ?, ?)', lines)
        for (value,) in table.execute('SELECT value FROM rows ORDER BY a, b, rowid'):
            yield json.loads(value)
    except sqlite3.Error as e:
        raise temporary_problem(e) from None


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
            reason = f'not of the published form: {type(e).__name__} {e}'
            made = [(None, dict(bad=reason, sample_id=f'{Path(path).name}-{name(i, value)}'))]
        yield from made
