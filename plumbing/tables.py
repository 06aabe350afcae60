"""Tables on disk: the parquet files of a dataset, row by row, what can be wrong with a row, and long lists in
temporary files."""

import base64
import json
import os
import re
import shutil
import sqlite3
import tempfile
import time
import unicodedata
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from os.path import abspath, exists
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from plumbing.console import cut, first_three
from plumbing.files import locked, refuse_impostor

SPLITS = ('train', 'val', 'test')

SCHEMA = pa.schema([
    ('image', pa.binary()),
    ('question', pa.string()),
    ('answer', pa.string()),
    ('caption', pa.string()),
    ('sample_id', pa.string()),
    ('type', pa.string()),
])
SOUND_SCHEMA = SCHEMA.append(pa.field('sound', pa.binary()))
MEDIA = ('image', 'sound')  # the columns that hold files

# ----------------------------------------------------------------------------
# writing a dataset


def write_dataset(out, rows, schema=SCHEMA, finish=None):
    """Writes (split, row) pairs to the folder `out`, which appears whole or not at all; `finish` may add
    files to it.

    Raises: FileExistsError when `out` is there already; ValueError where it is no name of a folder.
    """
    out = folder_to_write(out)
    partial = out.with_name(f'.{out.name}.partial')
    start = time.time()
    with ExitStack() as stack:
        stack.enter_context(locked(out.with_name(f'.{out.name}.lock'), wait=True))
        folder_to_write(out)  # another process may have made it meanwhile
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        stack.callback(shutil.rmtree, partial, ignore_errors=True)  # it is in place by then, or of no use
        files = {}
        for split in SPLITS:
            files[split] = SplitFile(partial / f'{split}.parquet', schema)
            stack.enter_context(files[split].writer)
        for split, row in rows:
            if files[split].is_full(row):
                files[split].flush()
                show_progress(out, files, start)
            files[split].add(row)
        for file in files.values():
            file.flush()
            file.writer.close()
        show_progress(out, files, start)
        print()
        if finish:
            finish(partial)
        for path in partial.iterdir():  # on the disk before the folder has its name
            with open(path, 'r+b') as f:
                os.fsync(f.fileno())
        os.replace(partial, out)


def folder_to_write(out):
    """The path of a folder that is not there yet. Raises: FileExistsError, ValueError."""
    path = Path(out)
    if path.name in ('', '..'):
        raise ValueError(f'--out={out}: expected the name of a new folder, data/mine, say')
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f'{place}: already there, a file; --out={out} is to be a new folder')
    if path.exists():
        raise FileExistsError(f'{path}: already there; delete it or choose another --out')
    return path


def show_progress(out, files, start):
    counts = ' | '.join(f'{split} {file.n_rows}' for split, file in files.items())
    print(f'\r{out} | {counts} questions | {time.time() - start:.0f} s', end='', flush=True)


class SplitFile:
    """The file of a split while it is written. Rows are gathered to row groups of at most 2,000 rows and some
    4 MB of different pictures and sounds, which are quickly read; in one of them a picture that is asked
    several times is held and stored once."""

    def __init__(self, path, schema):
        self.schema = schema
        self.n_rows = 0
        self.start_group()
        # without Arrow's own schema, which would say that pictures are a dictionary: a reader gets bytes
        self.writer = pq.ParquetWriter(path, self.table().schema, store_schema=False,
                                       use_dictionary=True, dictionary_pagesize_limit=2**30)

    def start_group(self):
        self.rows = []     # of the next row group; their pictures and sounds as numbers
        self.files = {key: {} for key in MEDIA if key in self.schema.names}  # the different ones, each with
        self.n_bytes = 0                                                     # its number

    def add(self, row):
        self.n_rows += 1
        numbers = {}
        for key, known in self.files.items():
            file = row.get(key)
            if file is not None and file not in known:
                known[file] = len(known)
                self.n_bytes += len(file)
            numbers[key] = known.get(file)  # none where the row has none
        self.rows.append(row | numbers)

    def is_full(self, row):
        """Whether this row begins the next row group: its picture or sound does not fit, unless it is here
        already."""
        is_new = any(row.get(key) is not None and row[key] not in known for key, known in self.files.items())
        return len(self.rows) == 2000 or self.n_bytes > 2**22 and is_new

    def flush(self):
        self.writer.write_table(self.table())
        self.start_group()

    def table(self):
        """The rows, whose pictures and sounds are numbers, as a table, with these as dictionaries."""
        schema = self.schema
        for key in self.files:
            schema = schema.set(schema.get_field_index(key), pa.field(key, pa.int32()))
        table = pa.Table.from_pylist(self.rows, schema)
        for key, known in self.files.items():
            numbers = table[key].combine_chunks()
            column = pa.DictionaryArray.from_arrays(numbers, pa.array(known, pa.binary()))
            table = table.set_column(table.schema.get_field_index(key), key, column)
        return table


# ----------------------------------------------------------------------------
# opening a split, and what can be wrong with its rows


def named(value, otherwise):
    """A row's sample_id or type as text, which may be 0, or `otherwise` where it has none."""
    return otherwise if value in (None, '') else str(value)


def open_split(folder, split):
    """-> the path of a split's file, and the file, opened. Raises: FileNotFoundError; ValueError where it
    lacks a column."""
    path = Path(folder) / f'{split}.parquet'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; a dataset is a folder with train.parquet, '
                                f'val.parquet and test.parquet (python data.py --help says how to draw or '
                                f'import one)')
    file = open_parquet(path)
    for needed in (MEDIA, ('question', 'caption'), ('answer', 'caption')):
        if not set(needed) & set(file.schema_arrow.names):
            raise ValueError(f'{path}: has no column {" or ".join(needed)}; it has '
                             f'{", ".join(file.schema_arrow.names)}')
    return path, file


def check_splits(folder):
    """Raises: FileNotFoundError or ValueError where a split is not there, lacks a column or has no rows;
    reads none of them."""
    for split in SPLITS:
        path, file = open_split(folder, split)
        if not file.metadata.num_rows:
            raise ValueError(f'{path}: has no rows; training, validation and test need some each: give more '
                             f'pictures, or files named train, val and test, to python data.py')


MOST_SIGNS = 10**5  # of a text: gpt2's pattern breaks down at a million spaces


def as_list(texts):
    """What a row has in a column of one text or several, its answers or captions, as a list."""
    if texts is None or texts == '':
        return []
    return texts if isinstance(texts, list) else [texts]


def row_problem(question, answers, captions):
    """What is wrong with the texts of a row, its kind, a colon, the details, or None. A row has a question
    and a list of answers, or a list of captions, or both."""
    if question is not None or not captions:
        if not isinstance(question, str):
            return 'the question is no text' + found([question])
        if not question.strip():
            return 'the question is empty'
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            return 'the answer is empty or no text' + found(answers)
    if not all(isinstance(caption, str) for caption in captions):
        return 'the caption is no text' + found(captions)
    if question is None and not all(caption.strip() for caption in captions):
        return 'the caption is empty'
    asked = [] if question is None else [question, *answers]
    longest = max(map(len, asked + captions))
    if longest > MOST_SIGNS:
        return f'a text has more than {MOST_SIGNS} signs: {longest}'
    if not is_unicode(*asked):
        return 'the question or answer is not in UTF-8'
    return None if is_unicode(*captions) else 'the caption is not in UTF-8'


def found(values):
    """The end of a message: the first value that is no text, where there is any."""
    for value in values:
        if value is not None and not isinstance(value, str):
            return f': of type {type(value).__name__}, {cut(repr(value))}'
    return ''


def is_unicode(*texts):
    """Whether texts can be written: half a character (a lone surrogate) comes of a file in another encoding
    than UTF-8, or of a bad escape."""
    return not any(re.search('[\ud800-\udfff]', text) for text in texts)


def report_bad(path, bad, n, remedy):
    """Raises: ValueError that counts the bad rows, names the first ones and says what to do; nothing where
    there are none."""
    if bad:
        first = first_three([f'row {i}: {reason}' for i, reason in bad])
        raise ValueError(f'{path}: {len(bad)} of {n} rows cannot be used: {first}: {remedy}')


# ----------------------------------------------------------------------------
# reading rows


BATCH_BYTES = 2**24  # of rows that are read at once


def open_parquet(path):
    """Raises: ValueError where the file is no parquet file or a damaged one."""
    refuse_impostor(path)
    try:
        # page by page: by itself pyarrow reads a whole row group before it gives the first row
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f'{path}: not a parquet file: {str(e).splitlines()[0]}') from None


def stream(path, columns):
    """Yields ((row group, row in it), row as a dict) for every row of a parquet file. Raises: ValueError."""
    for group, start, batch in batches(path, columns):
        try:
            rows = plain_rows(batch)
        except (pa.ArrowException, ValueError) as e:
            raise damaged(path, group, start, e) from None
        for i, row in enumerate(rows, start):
            yield (group, i), row


def batches(path, columns, groups=None):
    """Yields (row group, number of the first row there, some rows as Arrow holds them) of all row groups or
    some. At most BATCH_BYTES are in memory, or one row, and the page of the file that it is in. Raises:
    ValueError."""
    file = open_parquet(path)
    columns = [key for key in columns if key in file.schema_arrow.names]
    for group in range(file.num_row_groups) if groups is None else groups:
        # a row can be as large as all of its group: a picture that is stored once comes in every row
        most_bytes = max(1, file.metadata.row_group(group).total_byte_size)
        at_once = max(1, min(100, BATCH_BYTES // most_bytes))
        start = 0
        try:
            for batch in file.iter_batches(at_once, [group], columns):
                yield group, start, batch
                start += len(batch)
        except (pa.ArrowException, OSError, ValueError) as e:
            raise damaged(path, group, start, e) from None


def damaged(path, group, row, error):
    reason = str(error).splitlines()[0]
    return ValueError(f'{path}: damaged in row group {group}, behind row {row} of it: {reason}')


def plain_rows(batch):
    """The rows of a record batch as dicts; texts that are not in UTF-8 come with half characters in them, see
    `is_unicode`."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [[plain(value) for value in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, row)) for row in zip(*columns)]


def plain(value):
    """Python's value of one of Arrow's, whatever texts are inside."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, (pa.DictionaryScalar, pa.ExtensionScalar)):
            return plain(value.value)
        if isinstance(value, pa.StructScalar):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, pa.ListScalar):  # a map is a list, too
            return [plain(part) for part in value.values]
        return value.as_buffer().to_pybytes().decode(errors='surrogateescape')


def read_image(image, folder, key='image'):
    """The bytes of a picture file from what the image column holds, or a string that says what is wrong with
    it. key: the column, image or sound"""
    if isinstance(image, dict):
        image = image.get('bytes') or image.get('path')
    if isinstance(image, str):
        if not is_unicode(image) or '\0' in image:
            return f'the {key} path {cut(repr(image))} is none'
        if re.match(r'[A-Za-z][\w+.-]+://', image):
            return (f'the {key} is a URL: {cut(image)}; python data.py pixmo fetches those of a parquet file '
                    f'with a column image_url; or take img2dataset, and python data.py parquet')
        written_out = picture_in_text(image)
        if written_out is not None:
            return written_out or f'the {key} is empty'
        if len(image) > LONGEST_PATH:
            return f'the {key} is a text of {len(image)} signs, no path, no data: URI: {cut(repr(image))}'
        path = inside(image, folder)
        if path is None:
            return f'the {key} path {cut(repr(image))} leaves the folder: {cut(folder)}: {OTHER_FOLDER}'
        image = read_file(path, key)
    if image and not isinstance(image, (bytes, str)):
        return f'the {key} is a {type(image).__name__}, expected bytes or a path'
    return image or f'the {key} is empty'


def files_in(row, folder):
    """The picture file and the sound file of a row, those that it has, at least one: {'image' or 'sound':
    bytes, or a string that says what is wrong with it}."""
    files = {key: read_image(row[key], folder, key) for key in MEDIA if row.get(key) is not None}
    return files or {'image': 'the image is empty, and there is no sound'}


def file_problem(files):
    """What is wrong with the first of these files that cannot be read, or None."""
    return next((problem for problem in files.values() if isinstance(problem, str)), None)


OTHER_FOLDER = '--images=FOLDER of python data.py names the folder of the pictures'


def inside(path, folder):
    """The path of a file that is named from a folder, or None where the name leads out of it, by `..` or from
    the root. A link in it may lead anywhere: a folder of pictures often is one, to a larger disk."""
    path = Path(abspath(Path(folder) / path))
    is_inside = path.is_relative_to(abspath(folder)) or path.resolve().is_relative_to(Path(folder).resolve())
    return path if is_inside else None


# what picture files begin with, in base64, and signs of base64 alone: no path looks so
FIRST_SIGNS = r'\s*(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkq|TU0A|UD[UY])'
PICTURE_IN_BASE64 = re.compile(FIRST_SIGNS + r'[\w+/=\s-]{30,}', re.ASCII)
MOST_SIGNS_OF_PICTURE = 2**26
LONGEST_PATH = 2**12


def picture_in_text(text):
    """The bytes of a picture that a text holds, as a data: URI or in base64, or a string that says what is
    wrong with it, or None where the text is a path."""
    is_uri = text[:5].lower() == 'data:'
    if len(text) > MOST_SIGNS_OF_PICTURE:
        return f'the image is a text of more than {MOST_SIGNS_OF_PICTURE} signs: {len(text)}'
    if not is_uri and not PICTURE_IN_BASE64.fullmatch(text):
        return None
    head, _, body = text.partition(',') if is_uri else ('', '', text)
    data = unquote_to_bytes(body)
    if is_uri and not head.lower().endswith(';base64'):
        return data
    data = b''.join(data.split()).translate(bytes.maketrans(b'-_', b'+/'))
    try:
        return base64.b64decode(data + b'=' * (-len(data) % 4), validate=True)
    except ValueError:
        return f'the image is a data: URI that cannot be decoded: {cut(text)}'


def read_file(path, key='image'):
    """The bytes of a picture or sound file, or a string that says why there are none."""
    try:
        return as_on_disk(Path(path)).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return f'there is no {key} file: {cut(path)}'
    except (OSError, ValueError) as e:  # a folder, no permission, a name that no file can have
        return f'the {key} file cannot be read: {cut(path)} ({type(e).__name__})'


def as_on_disk(path):
    """A path whose names have the Unicode form that the disk knows: an accent is a part of its letter (NFC)
    or a sign behind it (NFD), and systems differ in which one they write."""
    if str(path).isascii() or exists(path) or path.parent == path:
        return path
    parent = as_on_disk(path.parent)
    names = [path.name, *(unicodedata.normalize(form, path.name) for form in ('NFC', 'NFD'))]
    return next((parent / name for name in names if exists(parent / name)), path)


# ----------------------------------------------------------------------------
# long lists that take little memory


def to_json(item):
    return json.dumps(item).encode()


def temporary_problem(error):
    """What is said where a temporary file cannot be made or grows no more: which folder that is."""
    try:
        folder = tempfile.gettempdir()
    except OSError:  # none of those that it tries
        folder = os.environ.get('TMPDIR', '/tmp')
    return OSError(f'{folder}: temporary files cannot be written here ({error}): make room, or set TMPDIR to '
                   f'another folder')


def temporary_table(columns):
    """An SQL table named `rows`, in a temporary file where it grows large. Raises: OSError."""
    try:
        folder = tempfile.gettempdir().replace("'", "''")
        table = sqlite3.connect('', isolation_level=None)
        table.execute(f"PRAGMA temp_store_directory = '{folder}'")  # else it chooses another one than Python
        table.execute(f'CREATE TABLE rows ({columns})')
        table.execute('BEGIN')
        return table
    except (sqlite3.Error, OSError) as e:
        raise temporary_problem(e) from None


class OnDisk(Sequence):
    """A long list in a temporary file: a million items take 8 MB of memory. `pack` makes bytes of an item,
    `unpack` the item of its bytes. Raises: OSError that names the temporary folder."""

    def __init__(self, pack=to_json, unpack=json.loads):
        self.pack = pack
        self.unpack = unpack
        try:
            self.file = tempfile.TemporaryFile()
        except OSError as e:
            raise temporary_problem(e) from None
        self.ends = array('Q', [0])  # where each item ends
        self.at_end = True

    def append(self, item):
        data = self.pack(item)
        try:
            if not self.at_end:
                self.file.seek(self.ends[-1])
                self.at_end = True
            self.ends.append(self.ends[-1] + self.file.write(data))
        except OSError as e:
            raise temporary_problem(e) from None

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        self.at_end = False
        try:
            self.file.seek(self.ends[i])  # what was appended is written first
            data = self.file.read(self.ends[i + 1] - self.ends[i])
        except OSError as e:
            raise temporary_problem(e) from None
        return self.unpack(data)


class KnownPictures:
    """What is known of every picture met so far, by the sha256 of its file, in a temporary file: a million
    pictures take no more memory than ten. Raises: OSError that names the temporary folder."""

    def __init__(self):
        self.table = temporary_table('digest BLOB PRIMARY KEY, value')

    def get(self, digest):
        found = self.execute('SELECT value FROM rows WHERE digest = ?', digest).fetchone()
        return found and json.loads(found[0])

    def __setitem__(self, digest, value):
        self.execute('INSERT OR REPLACE INTO rows VALUES (?, ?)', digest, json.dumps(value))

    def execute(self, command, *values):
        try:
            return self.table.execute(command, values)
        except sqlite3.Error as e:
            raise temporary_problem(e) from None


class View(Sequence):
    """A list whose items are made when they are asked for: `get(i)`, for i under `length()`."""

    def __init__(self, length, get):
        self.length = length
        self.get = get

    def __len__(self):
        return self.length()

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.get(k) for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.get(i)


class Pictures:
    """The different pictures, or sounds, of a parquet file, as bytes, read when they are asked for: all in
    order (iterate), or one ([i]), which reads its row group up to it, or on from the one before. `digests`
    holds the sha256 of each, `names` what to call it in messages."""

    def __init__(self, path, column='image'):
        self.path = path
        self.column = column
        self.groups = array('i')    # the row group of each picture
        self.places = array('i')    # its row there
        self.rows = array('i')      # its row in the file
        self.group = None           # the row group that was read last
        self.start = 0              # the rows that were read there, from this one on
        self.batch = ()
        self.ahead = None           # those behind them
        self.sums = OnDisk(bytes, bytes)
        self.digests = View(self.__len__, self.sums.__getitem__)
        self.names = View(self.__len__, self.name_of)

    def name_of(self, i):
        return f'{self.path}, row {self.rows[i]}'

    def add(self, digest, group, place, row):
        """-> its number"""
        self.sums.append(digest)
        self.groups.append(group)
        self.places.append(place)
        self.rows.append(row)
        return len(self.rows) - 1

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        places = zip(self.groups, self.places)
        place = next(places, None)
        for group, start, batch in batches(self.path, [self.column]):
            while place and place[0] == group and place[1] < start + len(batch):
                yield self.picture_in(batch, place[1] - start)
                place = next(places, None)

    def __getitem__(self, i):
        group = self.groups[i]
        place = self.places[i]
        if group != self.group or place < self.start:
            self.group = group
            self.start = 0
            self.batch = ()
            self.ahead = batches(self.path, [self.column], [group])
        while place >= self.start + len(self.batch):
            following = next(self.ahead, None)
            if following is None:
                self.group = None
                return 'it is gone: the file has changed since it was read first'
            _, self.start, self.batch = following
        return self.picture_in(self.batch, place - self.start)

    def picture_in(self, batch, i):
        return read_image(plain(batch[self.column][i]), self.path.parent, self.column)
