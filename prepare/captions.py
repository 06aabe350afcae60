"""
Captioned photographs, several captions a picture, as Flickr8k and Flickr30k come: captions.txt with lines
`picture.jpg,A caption .` below the header image,caption; or Flickr8k.token.txt with lines
`picture.jpg#0<tab>A caption .`

--source is that file, or the folder it is in; --images the photographs, or a folder images or Images beside
the file. All captions of a picture make one row, and the pictures are divided by their content.
"""

import csv
import re
from pathlib import Path

from prepare import published, text_lines

NAMES = ('captions.txt', 'Flickr8k.token.txt', 'results_20130124.token')


def rows(config):
    """Yields (split, row), a row a picture. Raises: FileNotFoundError."""
    source = Path(config.source)
    files = [source] + [source / name for name in NAMES]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise FileNotFoundError(f'{source}: no such file, and no folder with one of {", ".join(NAMES)}')
    folders = [file.parent / name for name in ('images', 'Images')] + [file.parent]
    images = Path(config.images) if config.images else next(filter(Path.is_dir, folders))

    def row(both):
        image, captions = both
        yield None, dict(image=images / image, caption=captions, sample_id=image)

    yield from published(file, captions_of(file).items(), row)


def captions_of(file):
    """-> {name of a picture: its captions}, in the order of the file."""
    captions = {}
    for line in text_lines(file):
        if re.match(r'[^,\t]+#\d+\t', line):
            image, caption = re.split(r'#\d+\t', line, maxsplit=1)
        else:
            image, *fields = next(csv.reader([line]), [''])
            caption = ','.join(fields)
        if image and (image, caption.strip()) != ('image', 'caption'):
            captions.setdefault(image.strip(), []).append(caption.strip())
    return captions
