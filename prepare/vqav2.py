"""
VQA v2: photographs from COCO, ten answers to every question. CC-BY 4.0, https://visualqa.org.

--source holds v2_OpenEnded_mscoco_{train,val}2014_questions.json and v2_mscoco_{train,val}2014_annotations.json, --images the folders train2014
and val2014. The answers of its test split are not published: its val split is our test split, and train is divided into train and val.
"""

from collections import Counter

from prepare import published, read_json


def rows(config):
    """Yields (split, row); a row's answers are the ten, the commonest first; its type is VQA's answer type."""
    for part, split in (('val2014', 'test'), ('train2014', 'train or val')):
        path = f'{config.source}/v2_mscoco_{part}_annotations.json'
        asked = read_json(f'{config.source}/v2_OpenEnded_mscoco_{part}_questions.json', 'questions')
        questions = {q.get('question_id'): q.get('question') for q in asked if isinstance(q, dict) and isinstance(q.get('question_id'), int)}

        def row(a):
            counts = Counter(answer['answer'] for answer in a['answers'])
            ten = sorted((answer['answer'] for answer in a['answers']), key=lambda answer: -counts[answer])
            yield split, dict(image=f"{config.images or config.source}/{part}/COCO_{part}_{a['image_id']:012}.jpg", question=questions.pop(a['question_id'], None),
                              answer=ten, sample_id=str(a['question_id']), type=a['answer_type'])

        number = lambda a, key: a[key] if isinstance(a, dict) and isinstance(a.get(key), int) else -1
        yield from published(path, sorted(read_json(path, 'annotations'), key=lambda a: (number(a, 'image_id'), number(a, 'question_id'))), row)
        yield from ((split, dict(bad='the question has no annotation', sample_id=str(id))) for id in questions)
