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
        file = open_parquet(path)
        column = {
            key: next((name for name in names if name in file.schema_arrow.names), None)
            for key, names in NAMES.items()
        }
        if column['image'] is None:
            raise ValueError(
                f'{path}: no image column; it has {", ".join(file.schema_arrow.names)}; URLs of PixMo: '
                f'python data.py pixmo'
            )
        for i, (_, row) in enumerate(stream(path, [name for name in column.values() if name])):
            row = {key: row.get(name) for key, name in column.items()}
            name = named(row['sample_id'], f'{path.stem}-{i}')
            if isinstance(row['image'], list):
                if len(row['image']) > 1:
                    yield split, dict(bad=f'{len(row["image"])} pictures in one row', sample_id=name)
                    continue
                row['image'] = row['image'][0] if row['image'] else None
            if row['image'] is None and row['status'] not in (None, 'success'):
                yield split, dict(missing=f'not fetched by img2dataset: {row["status"]}', sample_id=name)
                continue
            picture = read_image(row['image'], path.parent)
            if isinstance(picture, str):
                yield split, dict(bad=picture, sample_id=name)
                continue
            for k, (question, answer) in enumerate(turns(row['question'], row['answer'], row['messages'])):
                yield (
                    split,
                    dict(
                        image=picture,
                        question=question,
                        answer=answer,
                        caption=row['caption'],
                        type=row['type'],
                        sample_id=name + f'-{k}' * (k > 0),
                    ),
                )
