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
    for part, split in (('train', 'train'), ('val', 'val'), ('testdev', 'test')):
        files = [Path(config.source) / f'{part}_balanced_questions.json']
        if not files[0].is_file() and (everything := Path(config.source) / f'{part}_all_questions').is_dir():
            files = sorted(everything.glob('*.json'))

        def row(item):
            id, q = item
            yield (
                split,
                dict(
                    image=f"{config.images or config.source + '/images'}/{q['imageId']}.jpg",
                    question=q['question'],
                    answer=q.get('answer'),
                    sample_id=id,
                    type=q.get('types', {}).get('structural'),
                ),
            )

        for file in files:
            keyed = (
                (
                    [
                        json.dumps(item[1].get('imageId') if isinstance(item[1], dict) else None),
                        json.dumps(item[0]),
                    ],
                    item,
                )
                for item in pairs(file)
            )
            yield from published(file, sorted_on_disk(keyed), row, question_id)


def question_id(i, item):
    return item[0]


def pairs(file):
    """Yields (question id, question). Raises: ValueError."""
    for item in read_json(file):
        if not isinstance(item, tuple):
            raise ValueError(
                f'{file}: not of the published form: a list, where GQA has an object by question id'
            )
        yield item
