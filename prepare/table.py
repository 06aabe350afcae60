"""
Pictures of one's own: a CSV file with a header, or a file of JSON lines, with the columns image (a path
beside the file or below --images), question and answer (in JSON lines a list of answers, too) or caption;
sample_id and type if you like.

--source is one file, which is divided into train, val and test by the content of the pictures, or a folder
with files whose names say train, val or test.
"""

import csv
from pathlib import Path

from plumbing.tables import named, read_image
from prepare import published_first, read_json_lines


def rows(config):
    """Yields (split, row) for every line."""
    for file, split in files_of(Path(config.source)):
        lines = read_csv(file) if file.suffix == '.csv' else read_json_lines(file)
        for i, line in enumerate(lines):
            yield split, row_of(line, f'{file.name}-{i}', config.images or file.parent)


def files_of(source):
    """-> [(file, split or None)]. Raises: FileNotFoundError."""
    if source.is_file():
        return [(source, None)]
    files = []
    if source.is_dir():
        files = sorted(f for f in source.iterdir() if f.suffix in ('.csv', '.jsonl'))
    if not files:
        raise FileNotFoundError(f'{source}: no such file, and no folder with .csv or .jsonl files')
    return published_first(files, source)


def row_of(line, place, folder):
    """The row of a line, which is called after its place in the file unless it has a name."""
    if isinstance(line, ValueError):
        return dict(bad=str(line), sample_id=place)
    if not isinstance(line, dict) or not isinstance(line.get('image'), str):
        return dict(bad='no image path', sample_id=place)
    name = named(line.get('sample_id'), place)
    picture = read_image(line['image'], folder)
    if isinstance(picture, str):
        return dict(bad=picture, sample_id=name)
    type = line.get('type')
    return dict(
        image=picture,
        question=line.get('question') or None,  # an empty field of a CSV file is none
        answer=line.get('answer') or None,
        caption=line.get('caption') or None,
        type=None if type == '' else type,      # 0 is one
        sample_id=name,
    )


def read_csv(path):
    """Yields every line as a dict; a ValueError for one with more fields than the header. Raises:
    ValueError."""
    # surrogateescape: a line in another encoding than UTF-8 is a bad row, not the end of the file
    with path.open(newline='', encoding='utf-8-sig', errors='surrogateescape') as f:
        lines = csv.DictReader(f)
        try:
            for line in lines:
                if None in line:
                    yield ValueError(f'more fields than the header has: line {lines.line_num}')
                else:
                    yield line
        except csv.Error as e:
            raise ValueError(f'{path}, line {lines.line_num}: not CSV: {e}') from None
