"""
CLEVR 1.0: rendered scenes of simple solids, questions that take several steps. CC-BY 4.0,
https://cs.stanford.edu/people/jcjohns/clevr.

--source is the folder CLEVR_v1.0. The answers of its test split are not published: its val split is our test
split, and train is divided.
"""

from prepare import published, read_json


def rows(config):
    """Yields (split, row); a row's type is the question's last function (count, exist, query_color, ...)."""
    images = config.images or f'{config.source}/images'
    for part, split in (('val', 'test'), ('train', 'train or val')):
        path = f'{config.source}/questions/CLEVR_{part}_questions.json'

        def row(q):
            last = (q.get('program') or [{}])[-1]
            yield split, dict(
                image=f"{images}/{part}/{q['image_filename']}",
                question=q['question'],
                answer=as_text(q.get('answer')),
                sample_id=f"{part}-{q['question_index']}",
                type=last.get('function') or last.get('type'),  # two releases have two names for it
            )

        yield from published(path, read_json(path, 'questions'), row)


def as_text(answer):
    """Answers are texts; files of one's own hold true, false and numbers."""
    if isinstance(answer, bool):
        return 'yes' if answer else 'no'
    if isinstance(answer, (int, float)):
        return str(answer)
    return answer
