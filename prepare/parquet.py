"""
Any parquet file with pictures in it: an image column of Hugging Face, the output of img2dataset
(--output_format parquet), the parquet files of Edge-Glass, the_cauldron and FineVision.

--source is a file or a folder (data/train-00000-of-00005.parquet, train/0000.parquet, ...). A file whose
name, or folder's name below --source, says train, val or test is of that split; others are divided by the
content of the pictures. Columns are known by their usual names, see _columns.py; [USER] and [ASSISTANT] tags,
and lists of messages, make turns. Paths of pictures start beside the file or at --images.
"""

from plumbing.tables import open_parquet, stream
from prepare import files_below, published_first
from prepare._columns import check_columns, kind_of_type, rows_of, wrong_kinds


def rows(config):
    """Yields (split, row) for every row, and turn, of every file; a picture that img2dataset could not fetch
    is a missing one."""
    files = files_below(config, ('.parquet', '.parq', '.pq'))
    if not files:
        raise FileNotFoundError(f'{config.source}: no such file, and no folder with .parquet files; for .csv '
                                f'and .json files: python data.py table')
    for path, split in published_first(files, config.source):
        schema = open_parquet(path).schema_arrow
        kinds = [kind_of_type(type) for type in schema.types]
        columns = check_columns(path, schema.names, kinds)
        if unread := wrong_kinds(schema.names, kinds, columns):
            print(f'{path}: some columns are not read{unread}')
        for i, (_, values) in enumerate(stream(path, columns.values())):
            for row in rows_of(values, columns, f'{path.stem}-{i}', config.images or path.parent):
                yield split, row
