"""
Any parquet file with pictures in it: an image column of Hugging Face, the output of img2dataset
(--output_format parquet), the parquet files of Edge-Glass.

--source is a file or a folder (data/train-00000-of-00005.parquet, train/0000.parquet, ...). A file whose
name, or folder's name below --source, says train, val or test is of that split; others are divided by the
content of the pictures. Columns are known by their usual names; [USER] and [ASSISTANT] tags make turns.
"""

from pathlib import Path

from plumbing.tables import named, open_parquet, read_image, stream
from prepare import published_first, turns

NAMES = dict(  # what a column may be called, the first that is there counts
    image=('image', 'image_bytes', 'jpg', 'png', 'webp', 'img', 'picture', 'image.bytes', 'images'),
    question=('question', 'query', 'prompt'),
    answer=('answer', 'answers', 'multiple_choice_answer', 'label'),
    caption=('caption', 'text', 'TEXT'),
    sample_id=('sample_id', 'question_id', 'id', 'key'),
    type=('type', 'question_type', 'answer_type', 'source'),
    status=('status',),
    messages=('messages',),
)


def rows(config):
    """Yields (split, row) for every row, and turn, of every file; a picture that img2dataset could not fetch
    is a missing one."""
    source = Path(config.source)
    files = [source] if source.is_file() else list(source.rglob('*.parquet'))
    if not files:
        raise FileNotFoundError(f'{source}: no such file, and no folder with .parquet files')
    for path, split in published_first(files, source):
        column = columns_of(path)
        wanted = [name for name in column.values() if name]
        for i, (_, values) in enumerate(stream(path, wanted)):
            row = {key: values.get(name) for key, name in column.items()}
            row['sample_id'] = named(row['sample_id'], f'{path.stem}-{i}')
            for made in rows_of(row, path.parent):
                yield split, made


def columns_of(path):
    """-> {key: what its column is called in this file, or None}. Raises: ValueError without pictures."""
    names_there = open_parquet(path).schema_arrow.names
    column = {}
    for key, names in NAMES.items():
        column[key] = next((name for name in names if name in names_there), None)
    if column['image'] is None:
        raise ValueError(f'{path}: no image column; it has {", ".join(names_there)}; URLs of PixMo: '
                         f'python data.py pixmo')
    return column


def rows_of(row, folder):
    """Yields the rows that a row of the file makes: one for every turn, or one that says what is wrong."""
    name = row['sample_id']
    image = row['image']
    if isinstance(image, list):
        if len(image) > 1:
            yield dict(bad=f'{len(image)} pictures in one row', sample_id=name)
            return
        image = image[0] if image else None
    if image is None and row['status'] not in (None, 'success'):
        yield dict(missing=f'not fetched by img2dataset: {row["status"]}', sample_id=name)
        return
    picture = read_image(image, folder)
    if isinstance(picture, str):
        yield dict(bad=picture, sample_id=name)
        return
    for k, (question, answer) in enumerate(turns(row['question'], row['answer'], row['messages'])):
        yield dict(
            image=picture,
            question=question,
            answer=answer,
            caption=row['caption'],
            type=row['type'],
            sample_id=f'{name}-{k}' if k else name,
        )
