"""
easy-VQA: 64 x 64 pictures of one coloured shape, 48,248 questions. MIT, https://github.com/vzhou842/easy-VQA, folder easy_vqa/data.

Its own test split is kept. Its train split is divided by the content of the pictures: about one in ten is for validation.
"""

import hashlib
import json
from pathlib import Path


def rows(source):
    """Yields (split, row) for every question below the folder `source`, which holds train/ and test/."""
    for part in ('train', 'test'):
        file = Path(source) / part / 'questions.json'
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such file; --source is the folder that holds train/ and test/ of easy-VQA')
        pictures, split_of = {}, {}
        for i, (question, answer, image_id) in enumerate(json.loads(file.read_text())):
            if image_id not in pictures:
                picture = Path(source) / part / 'images' / f'{image_id}.png'
                if not picture.is_file():
                    raise FileNotFoundError(f'{picture}: no such file; question {i} of {file} asks about it')
                pictures[image_id] = picture.read_bytes()
                held_out = hashlib.sha256(pictures[image_id]).digest()[0] < 26
                split_of[image_id] = 'test' if part == 'test' else 'val' if held_out else 'train'
            yield split_of[image_id], dict(
                image=pictures[image_id], question=question, answer=answer, sample_id=f'{part}-{image_id}-{i}',
                type='yes/no' if answer in ('yes', 'no') else 'open')
