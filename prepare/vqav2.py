"""
VQA v2: photographs from COCO, ten answers to every question. CC-BY 4.0, https://visualqa.org.

--source holds v2_OpenEnded_mscoco_{train,val}2014_questions.json and v2_mscoco_{train,val}2014_annotations.json, --images the folders train2014
and val2014. The answers of its test split are not published: its val split is our test split, and train is divided into train and val.
"""

from collections import Counter
from itertools import chain, groupby

from prepare import published, read_json, sorted_on_disk


def rows(config):
    """Yields (split, row), the questions of a picture one after the other; a row's answers are the ten, the commonest first; its type is VQA's answer type."""
    for part, split in (('val2014', 'test'), ('train2014', 'train or val')):
        path = f'{config.source}/v2_mscoco_{part}_annotations.json'
        asked = read_json(f'{config.source}/v2_OpenEnded_mscoco_{part}_questions.json', 'questions')

        def row(a):
            if 'answers' not in a:
                yield split, dict(bad='the question has no annotation', sample_id=str(a['question_id']))
                return
            counts = Counter(answer['answer'] for answer in a['answers'])
            ten = sorted((answer['answer'] for answer in a['answers']), key=lambda answer: -counts[answer])
            yield split, dict(image=f"{config.images or config.source}/{part}/COCO_{part}_{a['image_id']:012}.jpg", question=a.get('question'),
                              answer=ten, sample_id=str(a['question_id']), type=a['answer_type'])

        both = sorted_on_disk((ids(value), value) for value in chain(asked, read_json(path, 'annotations')))
        yield from published(path, joined(both), row)


def ids(value):
    """A question's or annotation's picture and number, -1 where there is none."""
    return [value[key] if isinstance(value, dict) and isinstance(value.get(key), int) and value[key] < 2 ** 63 else -1 for key in ('image_id', 'question_id')]


def joined(both):
    """Yields question and annotation as one dict; one without the other, or of another form, alone."""
    for known, values in groupby(both, ids):
        if -1 in known:
            yield from values
        else:
            yield {key: value for one in values for key, value in one.items()}
