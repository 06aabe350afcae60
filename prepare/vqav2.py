"""
VQA v2: photographs from COCO, ten answers to every question. CC-BY 4.0, https://visualqa.org.

--source holds v2_OpenEnded_mscoco_{train,val}2014_questions.json and v2_mscoco_{train,val}2014_annotations.json, --images the folders train2014
and val2014. The answers of its test split are not published: its val split is our test split, and train is divided into train and val.
"""

from collections import Counter
from itertools import groupby

from prepare import read_json


def rows(config):
    """Yields (split, row); a row's answers are the ten, the commonest first; its type is VQA's answer type."""
    for part, split in (('train2014', 'train or val'), ('val2014', 'test')):
        questions = {q['question_id']: q['question'] for q in read_json(f'{config.source}/v2_OpenEnded_mscoco_{part}_questions.json')['questions']}
        annotations = read_json(f'{config.source}/v2_mscoco_{part}_annotations.json')['annotations']
        for image_id, asked in groupby(sorted(annotations, key=lambda a: (a['image_id'], a['question_id'])), key=lambda a: a['image_id']):
            for a in asked:
                counts = Counter(answer['answer'] for answer in a['answers'])
                ten = sorted((answer['answer'] for answer in a['answers']), key=lambda answer: -counts[answer])
                yield split, dict(image=f'{config.images or config.source}/{part}/COCO_{part}_{image_id:012}.jpg', question=questions.get(a['question_id']),
                                  answer=ten, sample_id=str(a['question_id']), type=a['answer_type'])
