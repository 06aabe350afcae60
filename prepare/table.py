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
    source = Path(config.source)
    files = (
        [source]
        if source.is_file()
        else sorted(f for f in source.iterdir() if f.suffix in ('.csv', '.jsonl'))
        if source.is_dir()
        else []
    )
    if not files:
        raise FileNotFoundError(f'{source}: no such file, and no folder with .csv or .jsonl files')
    for file, split in published_first(files, source) if source.is_dir() else [(source, None)]:
        for i, line in enumerate(read_csv(file) if file.suffix == '.csv' else read_json_lines(file)):
            if not isinstance(line, dict) or not isinstance(line.get('image'), str):
                yield (
                    split,
                    dict(
                        bad=str(line) if isinstance(line, ValueError) else 'no image path',
                        sample_id=f'{file.name}-{i}',
                    ),
                )
                continue
            known = {key: line.get(key) or None for key in ('question', 'answer', 'caption')} | dict(
                type=None if line.get('type') == '' else line.get('type')
            )
            name = named(line.get('sample_id'), f'{file.name}-{i}')
            picture = read_image(line['image'], config.images or file.parent)
            yield (
                split,
                dict(bad=picture, sample_id=name)
                if isinstance(picture, str)
                else known | dict(image=picture, sample_id=name),
            )


def read_csv(path):
    """Yields every line as a dict; a ValueError for one with more fields than the header. Raises:
    ValueError."""
    with path.open(
        newline='', encoding='utf-8-sig', errors='surrogateescape'
    ) as f:  # a line in another encoding is a bad row
        lines = csv.DictReader(f)
        try:
            for line in lines:
                yield (
                    ValueError(f'more fields than the header has: line {lines.line_num}')
                    if None in line
                    else line
                )
        except csv.Error as e:
            raise ValueError(f'{path}, line {lines.line_num}: not CSV: {e}') from None
