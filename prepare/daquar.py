"""
DAQUAR: 12,468 questions about 1,449 photographs of rooms (Malinowski and Fritz 2014, arXiv 1410.0210; for
research only).

--source holds all_qa_pairs.txt with train_images_list.txt and test_images_list.txt, or qa.894.raw.train.txt
and qa.894.raw.test.txt (or 37), as published: a line with a question, then one with its answer. --images, or
else the folder images of --source, holds image1.png and so on. The published split is kept, and val is taken
from the training pictures. Left out are the words `in the image17`, where they stand first, and the _ of
`garbage_bin`.
"""

import re
from itertools import zip_longest
from pathlib import Path

from prepare import published, text_lines

IN_IMAGE = r'\b(?:(?:in|of|on|at) )?(?:the )?(image ?\d+)\b'


def rows(config):
    """Yields (split, row) for every question. Raises: FileNotFoundError, ValueError."""
    source = Path(config.source)
    images = Path(config.images or source / 'images')
    split_of_image = {}
    for split in ('test', 'train'):
        listed = source / f'{split}_images_list.txt'
        if listed.is_file():
            split_of_image |= dict.fromkeys((line.strip() for line in text_lines(listed)), split)
    for file in question_files(source):

        def row(pair):
            question, answer = pair
            found = re.search(IN_IMAGE, question)
            if not answer or not found:
                raise ValueError('expected a question that names a picture, in the imageN, and an answer')
            image = found[1].replace(' ', '')
            if split_of_image and image not in split_of_image:
                raise ValueError(f'{image} is in neither list of pictures')
            split = split_of_image.get(image) or ('test' if 'test' in file.name else 'train')
            question = re.sub(IN_IMAGE, '', question)  # some name it twice
            yield 'train or val' if split == 'train' else split, dict(
                image=images / f'{image}.png',
                question=re.sub(r'\s*\?\s*$', '?', re.sub(r'\s+', ' ', question).strip()),
                answer=answer.replace('_', ' ').strip(),
                type='count' if answer.strip().isdigit() else 'color' if 'colo' in question else 'thing',
            )

        yield from published(file, pairs(file), row)


def question_files(source):
    """Test first: its pictures are in no other split. Raises: FileNotFoundError."""
    whole = source / 'all_qa_pairs.txt'
    lists = [source / f'{split}_images_list.txt' for split in ('train', 'test')]
    if whole.is_file() and all(map(Path.is_file, lists)):
        return [whole]
    files = sorted(source.glob('qa.*.raw.test.txt'))[-1:] + sorted(source.glob('qa.*.raw.train.txt'))[-1:]
    if len(files) < 2:
        raise FileNotFoundError(f'{source}: expected all_qa_pairs.txt with train_images_list.txt and '
                                f'test_images_list.txt, or qa.894.raw.train.txt and qa.894.raw.test.txt')
    return files


def pairs(file):
    """Yields (question, answer), the lines two by two."""
    lines = [line.strip() for line in text_lines(file)]
    for question, answer in zip_longest(lines[::2], lines[1::2]):
        if question or answer:  # an empty line is an answer that is missing: those below keep their places
            yield question, answer
