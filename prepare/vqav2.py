"""
VQA v2: photographs from COCO, ten answers to every question. CC-BY 4.0, https://visualqa.org.

--source holds v2_OpenEnded_mscoco_{train,val}2014_questions.json and
v2_mscoco_{train,val}2014_annotations.json, --images the folders train2014 and val2014. The answers of its
test split are not published: its val split is our test split, and train is divided into train and val.
"""

import re
from itertools import chain, groupby

from prepare import published, read_json, sorted_on_disk


def rows(config):
    """Yields (split, row), the questions of a picture one after the other; a row's answers are the ten; its
    type is VQA's answer type."""
    images = config.images or config.source
    for part, split in (('val2014', 'test'), ('train2014', 'train or val')):
        asked = f'{config.source}/v2_OpenEnded_mscoco_{part}_questions.json'
        answered = f'{config.source}/v2_mscoco_{part}_annotations.json'

        def row(a):
            name = str(a['question_id'])
            if 'answers' not in a:
                yield split, dict(bad='the question has no annotation', sample_id=name)
                return
            yield split, dict(
                image=f"{images}/{part}/COCO_{part}_{a['image_id']:012}.jpg",
                question=a.get('question'),
                answer=[answer['answer'] for answer in a['answers']],
                sample_id=name,
                type=a['answer_type'],
            )

        values = chain(read_json(asked, 'questions'), read_json(answered, 'annotations'))
        both = sorted_on_disk((ids(value), value) for value in values)
        yield from published(answered, joined(both), row)


def ids(value):
    """A question's or annotation's picture and number, -1 where there is none."""
    return [number_of(value, 'image_id'), number_of(value, 'question_id')]


def number_of(value, key):
    if not isinstance(value, dict) or not isinstance(value.get(key), int):
        return -1
    return value[key] if value[key] < 2**63 else -1  # as many bits as the table on disk has


def joined(both):
    """Yields question and annotation as one dict; one without the other, or of another form, alone."""
    for known, values in groupby(both, ids):
        if -1 in known:
            yield from values
        else:
            yield {key: value for one in values for key, value in one.items()}


# ----------------------------------------------------------------------------
# the official score

NUMBER_WORDS = 'zero one two three four five six seven eight nine ten'.split()
NUMBERS = {word: str(n) for n, word in enumerate(NUMBER_WORDS)} | {'none': '0'}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
    """.split()
ARTICLES = ('a', 'an', 'the')


def contractions():
    """{word with one apostrophe left out: the word with all of them}"""
    full = {}
    for word in CONTRACTED:
        for i, sign in enumerate(word):
            if sign == "'":
                full[word[:i] + word[i + 1:]] = word
    return full | {"somebody'd": 'somebodyd'}  # as the official script has it


CONTRACTIONS = contractions()


def vqa_accuracy(prediction, answers):
    """The official accuracy of VQA v2, in 0..1: the mean over ten people of min(1, a third of how many of the
    other nine gave this answer).

    Source: GT-Vision-Lab/VQA, vqaEval.py at a013f00, with what it does and does not mean to do: answers are
        normalised only where people disagree, 'none' is 0, and a point goes unless a digit follows it (of
        the first 32).
    """
    prediction = on_one_line(prediction)
    answers = [on_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = normalised(prediction)
        answers = [normalised(answer) for answer in answers]
    same = [answer == prediction for answer in answers]
    return sum(min(1, (sum(same) - own) / 3) for own in same) / len(same)


def on_one_line(text):
    return text.replace('\n', ' ').replace('\t', ' ').strip()


def normalised(text):
    has_thousands = re.search(r'\d,\d', text)
    out = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        at_edge = sign + ' ' in text or ' ' + sign in text
        out = out.replace(sign, '' if at_edge or has_thousands else ' ')
    out = re.sub(r'\.(?!\d)', '', out, count=32)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return ' '.join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
