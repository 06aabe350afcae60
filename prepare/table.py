"""
Pictures of one's own: a CSV file with a header, a JSON list, or a file of JSON lines, with the columns image
(a path beside the file or below --images, or a data: URI), question and answer or caption (in JSON lists of
them, too); sample_id, type and group if you like. Fields of a CSV file are parted by , ; | or tabs. JSON may
have the talks of LLaVA (conversations) in place of questions. More names of columns: _columns.py.

--source is a file or a folder. A file whose name says train, val or test is of that split; others are divided
by the content of the pictures.
"""

import csv
import re
from collections import deque
from itertools import chain, islice
from pathlib import Path

from plumbing.console import cut
from plumbing.tables import read_image
from prepare import files_below, published_first, read_json, read_json_lines, text_lines
from prepare._columns import check_columns, columns_of, kind_of, rows_of

CSV = ('.csv', '.tsv')
JSON = ('.json', '.jsonl', '.ndjson')
DELIMITERS = ',;\t|'
MOST_LINES = 1000  # of a record of a CSV file, whose texts may have lines


def rows(config):
    """Yields (split, row) for every line, or turn of a talk in it."""
    for file, split in published_first(files_of(config), config.source):
        folder = config.images or file.parent
        lines = csv_rows(file, folder) if file.suffix.lower() in CSV else json_rows(file)
        for i, (line, columns) in enumerate(lines):
            for row in rows_of(line, columns, f'{file.name}-{i}', folder):
                yield split, row


def files_of(config):
    """-> the files to read. Raises: FileNotFoundError, ValueError."""
    files = files_below(config, CSV + JSON)
    on_top = [file for file in files if file.parent == Path(config.source)]
    if on_top and len(on_top) < len(files):  # those below may belong to the pictures
        deeper = next(file for file in files if file not in on_top)
        print(f'{config.source}: {len(files) - len(on_top)} files in folders below it are not read, '
              f'{deeper}, for example; give their folder as --source to read them')
    files = on_top or files
    if not files:
        raise FileNotFoundError(f'{config.source}: no such file, and no folder with .csv, .tsv, .json or '
                                f'.jsonl files; for .parquet files: python data.py parquet')
    for file in files:
        if file.suffix.lower() not in CSV + JSON:
            raise ValueError(f'{file}: expected a name that ends in {", ".join(CSV + JSON)}; for .parquet '
                             f'files: python data.py parquet')
    return files


# ----------------------------------------------------------------------------
# JSON


def json_rows(path):
    """Yields (row, its columns) of a list, or of lines, as the content says; a ValueError for a line that is
    no object. Raises: ValueError."""
    with open(path, 'rb') as f:
        start = f.read(2**10).lstrip(b'\xef\xbb\xbf\xfe\xff\0 \t\r\n')
    values = read_json(path) if start.startswith(b'[') else read_json_lines(path)
    first = list(islice(values, 20))
    objects = [value for value in first if isinstance(value, dict)]
    if objects:
        names = list({name: None for value in objects for name in value})
        kinds = [kind_of(value.get(name) for value in objects) for name in names]
        hint = ''
        if len(first) == 1:
            hint = '; expected a list of objects, or one object a line, and this is a single object'
        check_columns(path, names, kinds, hint)
    for value in chain(first, values):
        if isinstance(value, dict):
            yield value, columns_of(tuple(value))
        elif isinstance(value, ValueError):
            yield value, {}
        else:
            yield ValueError(f'not an object with columns: {cut(repr(value))}'), {}


# ----------------------------------------------------------------------------
# CSV


class Lines:
    """The lines of a file, some of which can be put back; `taken` holds those since the last record."""

    def __init__(self, lines):
        self.lines = lines
        self.again = deque()
        self.taken = []

    def __iter__(self):
        return self

    def __next__(self):
        line = self.again.popleft() if self.again else next(self.lines)
        self.taken.append(line)
        if len(self.taken) > MOST_LINES:
            raise csv.Error(f'a quote that is open for {MOST_LINES} lines')
        return line

    def put_back(self):
        """All that were taken but the first one."""
        self.again.extendleft(reversed(self.taken[1:]))
        self.taken = self.taken[:1]


def csv_rows(path, folder):
    """Yields (line, its columns) of a CSV file; a ValueError for a line that is not as the others. Raises:
    ValueError."""
    lines = Lines(text_lines(path, newline=''))
    header = next((line for line in lines if line.strip() and line[:4] != 'sep='), '')  # Excel writes sep=;
    if not header:
        raise ValueError(f'{path}: the file is empty; expected a header, such as: image,question,answer')
    delimiter = likely_delimiter(header, DELIMITERS)
    names = split_line(header, delimiter)
    hint = f'; its fields were taken to be parted by {delimiter!r}'
    other = likely_delimiter(header, DELIMITERS + ''.join(re.findall(r'[^\w"\r\n]', header)))
    if other not in DELIMITERS:
        hint = f'; its fields are likely parted by {other!r}, expected one of , ; | and tab'
    elif not columns_of(tuple(names)):
        hint += '; is there no header? The first line should be one, such as: image,question,answer'
    columns = check_columns(path, names, ['text'] * len(names), hint)
    image = columns.get('image') or columns['sound']
    for number, fields in records(lines, delimiter, names.index(image), len(names), Path(folder)):
        if isinstance(fields, str):
            yield ValueError(fields), {}
        elif fields:
            yield dict(zip(names, fields)), columns


def likely_delimiter(header, signs):
    """The sign that parts a header into most columns of a known name."""
    return max(signs, key=lambda sign: len(columns_of(tuple(split_line(header, sign)))))


def split_line(line, delimiter):
    """The fields of a line that stands alone."""
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def records(lines, delimiter, image, n_fields, folder):
    """Yields (number of its line, fields) of every record, or in their place what is wrong with it. A quote
    that is not closed, or lines later, costs the line that it stands on: those that it swallowed are read
    anew."""
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    number = len(lines.taken)
    while True:
        number += 1
        lines.taken = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            fields = f'not CSV: line {number}: {e}'
            lines.put_back()
        if any(is_row(line, delimiter, image, n_fields, folder) for line in lines.taken[1:]):
            fields = f'not CSV: line {number}: a quote is open, and closed in another row'
            lines.put_back()
        if isinstance(fields, list) and fields and len(fields) != n_fields:
            more = 'more' if len(fields) > n_fields else 'fewer'
            fields = f'{more} fields than the header has: line {number}'
        if any('\0' in line for line in lines.taken):
            fields = f'not text: line {number}: it has a zero byte'
        yield number, fields
        number += len(lines.taken) - 1


def is_row(line, delimiter, image, n_fields, folder):
    """Whether a line that stands within quotes is itself a row, with a picture."""
    fields = split_line(line, delimiter)
    return len(fields) >= n_fields and isinstance(read_image(fields[image].strip(' "'), folder), bytes)
