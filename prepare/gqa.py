"""
GQA: compositional questions about photographs. CC-BY 4.0, https://cs.stanford.edu/people/dorarad/gqa.

--source holds {train,val,testdev}_balanced_questions.json or, for train, the folder train_all_questions; --images the photographs. Its testdev split
is our test split.
"""

from pathlib import Path

from prepare import read_json


def rows(config):
    """Yields (split, row), the questions of a picture one after the other; a row's type is GQA's structural type."""
    for part, split in (('train', 'train'), ('val', 'val'), ('testdev', 'test')):
        files = [Path(config.source) / f'{part}_balanced_questions.json']
        if not files[0].is_file() and (everything := Path(config.source) / f'{part}_all_questions').is_dir():
            files = sorted(everything.glob('*.json'))
        for file in files:
            for id, q in sorted(read_json(file).items(), key=lambda item: (item[1]['imageId'], item[0])):
                yield split, dict(image=f"{config.images or config.source + '/images'}/{q['imageId']}.jpg", question=q['question'], answer=q.get('answer'),
                                  sample_id=id, type=q.get('types', {}).get('structural'))
