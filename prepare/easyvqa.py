"""
easy-VQA: 64 x 64 pictures of one coloured shape, 48,248 questions. MIT, https://github.com/vzhou842/easy-VQA, folder easy_vqa/data.

Its own test split is kept; its train split is divided into train and val by the content of the pictures.
"""

from prepare import read_json


def rows(config):
    """Yields (split, row) for every question below the folder --source, which holds train/ and test/."""
    for part in ('train', 'test'):
        for i, (question, answer, image_id) in enumerate(read_json(f'{config.source}/{part}/questions.json')):
            yield 'test' if part == 'test' else 'train or val', dict(
                image=f'{config.source}/{part}/images/{image_id}.png', question=question, answer=answer, sample_id=f'{part}-{image_id}-{i}',
                type='yes/no' if answer in ('yes', 'no') else 'open')
