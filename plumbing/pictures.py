"""Pictures: decoded safely, made upright, RGB and square, and put together on sheets to look at."""

import io
import math
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from plumbing.console import printable
from plumbing.files import impostor

# no others: to decode EPS Pillow starts a program that runs what is in it
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')

# what Pillow raises for a bad file, beside its own errors
UNREADABLE = (OSError, SyntaxError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError,
              AssertionError, EOFError, ImportError, MemoryError, struct.error, zlib.error)

# what the EXIF orientation asks for; 1 is a picture that lies as it should
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def rgb_picture(data):
    """A picture file as it is looked at: decoded, upright, RGB. Import, encoder and sheets all ask here or in
    the two functions that this one is made of, so what one of them takes, all take. Raises: ValueError."""
    return as_seen(open_picture(data))


def open_picture(data, most_pixels=2 ** 26, side=None):
    """Decodes a picture file completely. Raises: ValueError where it is no picture, is cut off, moves, or is
    gigantic: its kind, a colon, the details.

    side: of the square that it becomes, in pixels; None: not known. A JPEG of four times that side is decoded
    at half its size, a larger one at a quarter or an eighth: twice the side is left, and it takes a third of
    the time, or a sixth. After squaring, smooth pictures are off by 1 or 2 of 255, grain as fine as a pixel
    by up to 30."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > most_pixels:
            raise ValueError(f'more than {most_pixels} pixels: {picture.width} x {picture.height}')
        # the second picture of an MPO is a preview
        if getattr(picture, 'is_animated', False) and picture.format != 'MPO':
            raise ValueError(f'animated: {picture.n_frames} frames')
        if side is not None:
            picture.draft(None, (2 * side, 2 * side))  # of other formats this does nothing
        picture.load()
        if picture.format == 'PNG' and 'transparency' in picture.info:
            picture.info['transparency'] = in_eight_bits(picture, depth=data[24])
        return picture
    except Image.DecompressionBombError as e:
        raise ValueError(f'more than {most_pixels} pixels: {e}') from None
    except UnidentifiedImageError:
        raise ValueError(f"not a picture: {impostor(data) or 'of no known format'}") from None
    except UNREADABLE as e:
        raise ValueError(f'not a picture that can be decoded: {e or type(e).__name__}') from None


def in_eight_bits(picture, depth):
    """What is transparent in a PNG: it is written in the file's depth, and Pillow makes 8 bits of all but
    grey of 16."""
    level = picture.info['transparency']
    if picture.mode == 'L':
        return level * 255 // (2 ** depth - 1)
    if picture.mode == 'RGB' and depth == 16:
        return tuple(part >> 8 for part in level)
    return level


def as_seen(picture, turn=True):
    """A Pillow picture, upright unless it shall not be turned, as RGB. Raises: ValueError, of the form of
    `open_picture`."""
    try:
        return as_rgb(upright(picture) if turn else picture)
    except UNREADABLE as e:
        raise ValueError(f'not a picture that can be decoded: {e or type(e).__name__}') from None


def upright(picture):
    """A photograph turned as its EXIF orientation says; where that cannot be read it is taken as it lies."""
    try:
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # cameras write anything there, and Pillow raises anything
        turn = None
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    # without its EXIF: it is turned once, and nothing has to be written
    turned.info = {key: value for key, value in picture.info.items() if key == 'transparency'}
    return turned


def as_rgb(picture):
    """A picture of any mode but floats as RGB; what is transparent becomes white, and of grey with more than
    8 bits, 16 are read. Raises: ValueError."""
    if picture.mode.startswith(('I', 'F')):
        picture = eight_bits(picture)
    elif {'A', 'a'} & set(picture.getbands()) or 'transparency' in picture.info:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
    return picture.convert('RGB')


def eight_bits(picture):
    """Grey with more than 8 bits, which Pillow would cut off at 255, as grey with 8; what is transparent is
    judged before: two levels of 16 bits become one of 8. Raises: ValueError."""
    levels = np.array(picture.convert('F'))                                            # (h, w)
    low = levels.min()
    high = levels.max()
    if picture.mode == 'F' or low < 0 or high > 65535:
        raise ValueError(f'a grey picture of mode {picture.mode} with values from {low:g} to {high:g}: '
                         'expected 8 or 16 bits a pixel')
    grey = np.floor(levels / 257 + 0.5).astype(np.uint8)                               # (h, w)
    if 'transparency' in picture.info:
        grey[levels == picture.info['transparency']] = 255
    return Image.fromarray(grey)


FILTERS = dict(bicubic=Image.BICUBIC, bilinear=Image.BILINEAR, lanczos=Image.LANCZOS)


def squared(picture, side, fit, border, crop_pct=1.0, interpolation='bicubic', half_to_even=False):
    """An RGB picture as a square of `side` pixels.

    fit: 'squash', out of shape; 'crop', the middle; 'pad', all of it in shape, between bars of the colour
    `border`. crop_pct: of the side of that square the middle that is kept. half_to_even: where the middle
    lies between two pixels, the even one begins it, as in torchvision; else the one before.
    Raises: ValueError.
    """
    w, h = picture.size
    full = int(side / crop_pct)  # of which `side` pixels are kept
    if fit == 'squash':
        size = (full, full)
    elif fit == 'crop':  # the short side becomes `full`; cut down, as CLIP's own preprocessing does
        size = (full, int(full * h / w)) if w <= h else (int(full * w / h), full)
    elif fit == 'pad':  # the long side becomes `full`
        size = (max(1, round(full * w / h)), full) if w <= h else (full, max(1, round(full * h / w)))
    else:
        raise ValueError(f'fit={fit}: expected squash, crop or pad')
    if size[0] * size[1] > 2 ** 26 and max(w, h) > 4 * min(w, h):
        # so long and thin that all of it would fill the memory: its middle is cut out first
        left = max(0, (w - 3 * h) // 2)
        top = max(0, (h - 3 * w) // 2)
        middle = picture.crop((left, top, w - left, h - top))
        return squared(middle, side, fit, border, crop_pct, interpolation, half_to_even)
    if picture.size != size:
        picture = picture.resize(size, FILTERS[interpolation])
    if fit == 'pad':
        square = Image.new('RGB', (full, full), border)
        square.paste(picture, ((full - picture.width) // 2, (full - picture.height) // 2))
        picture = square
    if picture.size == (side, side):
        return picture
    # a margin of k + .5: torchvision rounds it to an even number, CLIP's preprocessing down
    left, top = ((n - side) / 2 for n in picture.size)
    left = round(left) if half_to_even else int(left)
    top = round(top) if half_to_even else int(top)
    return picture.crop((left, top, left + side, top + side))


def picture_sheet(tiles, columns=6, scale=3, colors=None):
    """A sheet of pictures with lines of text under them, drawn with Pillow.

    tiles: [(picture, [line, ...]), ...]; colors: of a tile's text, black without them.
    """
    font = ImageFont.load_default(13)
    pad = 8
    line_px = 17
    width = max(200, scale * max(picture.width for picture, _ in tiles))
    wrapped = [[part for line in lines for part in wrap(line, font, width)] for _, lines in tiles]
    tallest = scale * max(picture.height for picture, _ in tiles)
    height = tallest + line_px * max(len(lines) for lines in wrapped) + 4
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new('RGB', (columns * (width + pad) + pad, rows * (height + pad) + pad), 'white')
    draw = ImageDraw.Draw(sheet)
    for k, ((picture, _), lines) in enumerate(zip(tiles, wrapped)):
        x = pad + k % columns * (width + pad)
        y = pad + k // columns * (height + pad)
        big = picture.convert('RGB').resize((scale * picture.width, scale * picture.height), Image.NEAREST)
        sheet.paste(big, (x, y))
        color = colors[k] if colors else 'black'
        for i, line in enumerate(lines):
            draw.text((x, y + big.height + 2 + line_px * i), line, color, font)
    return sheet


def wrap(line, font, width):
    """A line of text as lines of at most `width` pixels; a word that is wider stands alone."""
    lines = ['']
    for word in printable(line).split(' '):
        longer = f'{lines[-1]} {word}'
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word.strip())
        else:
            lines[-1] = longer.strip()
    return lines
