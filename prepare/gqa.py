"""
GQA: compositional questions about photographs. CC-BY 4.0, https://cs.stanford.edu/people/dorarad/gqa.

--source holds {train,val,testdev}_balanced_questions.json or, for train, the folder train_all_questions;
--images the photographs. Its testdev split is our test split.
"""

import json
from pathlib import Path

from prepare import published, read_json, sorted_on_disk


def rows(config):
    """Yields (split, row), the questions of a picture one after the other; a row's type is GQA's structural
    type."""
    images = config.images or f'{config.source}/images'
    for part, split in (('train', 'train'), ('val', 'val'), ('testdev', 'test')):

        def row(item):
            id, q = item
            yield split, dict(
                image=f"{images}/{q['imageId']}.jpg",
                question=q['question'],
                answer=q.get('answer'),
                sample_id=id,
                type=q.get('types', {}).get('structural'),
            )

        for file in question_files(Path(config.source), part):
            by_picture = sorted_on_disk((picture_and_id(item), item) for item in pairs(file))
            yield from published(file, by_picture, row, question_id)


def question_files(source, part):
    balanced = source / f'{part}_balanced_questions.json'
    everything = source / f'{part}_all_questions'
    if not balanced.is_file() and everything.is_dir():
        return sorted(everything.glob('[!.]*.json'))  # none that is hidden
    return [balanced]


def pairs(file):
    """Yields (question id, question). Raises: ValueError."""
    for item in read_json(file):
        if not isinstance(item, tuple):
            raise ValueError(f'{file}: not of the published form: a list, where GQA has an object by '
                             f'question id')
        yield item


def picture_and_id(item):
    """What a question is sorted by; as JSON, since in a file of one's own it may be of any type."""
    id, q = item
    picture = q.get('imageId') if isinstance(q, dict) else None
    return json.dumps(picture), json.dumps(id)


def question_id(i, item):
    return item[0]
