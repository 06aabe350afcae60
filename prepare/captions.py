"""
Captioned photographs, several captions a picture, as Flickr8k and Flickr30k come: captions.txt with lines
`picture.jpg,A caption .` below the header image,caption; or Flickr8k.token.txt with lines
`picture.jpg#0<tab>A caption .`

--source is that file, or the folder it is in; --images the photographs, else a folder images or Images beside
the file, else its own. All captions of a picture make one row, and the pictures are divided by their content.
"""

import csv
import re
from pathlib import Path

from plumbing.console import cut
from prepare import published, text_lines

NAMES = ('captions.txt', 'Flickr8k.token.txt', 'results_20130124.token')
IMAGE = ('image', 'image_name', 'file', 'filename')
CAPTION = ('caption', 'comment')
TOKEN_SIGN = r'#\d+\t'
TOKEN = r'[^,\t]+' + TOKEN_SIGN


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
    """-> {name of a picture: its captions}, in the order of the file. Raises: ValueError."""
    captions = {}
    for image, caption in pairs(file):
        captions.setdefault(image, []).append(caption)
    return captions


def pairs(file):
    """Yields (name of a picture, a caption of it). Raises: ValueError."""
    first = next(iter(text_lines(file)), '')
    if re.match(TOKEN, first):
        for line in text_lines(file):
            if line.strip():
                image, *caption = re.split(TOKEN_SIGN, line, maxsplit=1)
                yield image.strip(), ''.join(caption).strip()
        return
    reader = csv.reader(text_lines(file, newline=''), delimiter='|' if '|' in first else ',')
    names = [name.strip().lower() for name in next(reader, [])]
    places = [[k for k, name in enumerate(names) if name in wanted] for wanted in (IMAGE, CAPTION)]
    if not all(places):
        raise ValueError(f'{file}: its first line is {cut(first.strip())}: expected a header such as '
                         'image,caption, or picture.jpg#0<tab>A caption')
    image, caption = places[0][0], places[1][0]
    for fields in reader:
        if any(map(str.strip, fields)):  # commas of a caption without quotes are its own
            yield fields[image].strip(), ','.join(fields[caption:]).strip()
