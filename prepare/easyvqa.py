"""
easy-VQA: 64 x 64 pictures of one coloured shape, 48,248 questions. MIT, https://github.com/vzhou842/easy-VQA,
folder easy_vqa/data.

Its own test split is kept; its train split is divided into train and val by the content of the pictures.
"""

from prepare import published, read_json


def rows(config):
    """Yields (split, row) for every question below the folder --source, which holds train/ and test/."""
    images = config.images or config.source
    for part, split in (('test', 'test'), ('train', 'train or val')):
        path = f'{config.source}/{part}/questions.json'

        def row(numbered):
            i, (question, answer, image_id) = numbered
            yield split, dict(
                image=f'{images}/{part}/images/{image_id}.png',
                question=question,
                answer=answer,
                sample_id=f'{part}-{image_id}-{i}',
                type='yes/no' if answer in ('yes', 'no') else 'open',
            )

        yield from published(path, enumerate(read_json(path)), row)
