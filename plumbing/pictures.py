"""Pictures: decoded safely, made upright, RGB and square, and put together on sheets to look at."""

import io
import math
import struct
import zlib

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from plumbing.console import printable

# no others: to decode EPS Pillow starts a program that runs what is in it
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')

# what Pillow raises for a bad file, beside its own errors
UNREADABLE = (OSError, SyntaxError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError,
              EOFError, MemoryError, struct.error, zlib.error)


def open_picture(data, most_pixels=2 ** 26):
    """Decodes a picture file completely. Raises: ValueError where it is no picture, is cut off, moves, or is
    gigantic: its kind, a colon, the details."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > most_pixels:
            raise ValueError(f'more than {most_pixels} pixels: {picture.width} x {picture.height}')
        # the second picture of an MPO is a preview
        if getattr(picture, 'is_animated', False) and picture.format != 'MPO':
            raise ValueError(f'animated: {picture.n_frames} frames')
        picture.load()
        return picture
    except Image.DecompressionBombError as e:
        raise ValueError(f'more than {most_pixels} pixels: {e}') from None
    except UnidentifiedImageError:
        raise ValueError('not a picture: of no known format') from None
    except UNREADABLE as e:
        raise ValueError(f'not a picture that can be decoded: {e or type(e).__name__}') from None


def upright(picture):
    """A photograph turned as its EXIF orientation says; with damaged EXIF it is taken as it lies."""
    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, OSError, struct.error):
        return picture


def as_rgb(picture):
    """A picture of any mode but floats as RGB; what is transparent becomes white, and of grey with more than
    8 bits, 16 are read. Raises: ValueError."""
    if 'A' in picture.getbands() or 'transparency' in picture.info:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
    if picture.mode.startswith(('I', 'F')):  # grey with more than 8 bits, which Pillow would cut off at 255
        low, high = picture.convert('F').getextrema()
        if picture.mode == 'F' or low < 0 or high > 65535:
            raise ValueError(f'a grey picture of mode {picture.mode} with values from {low:g} to {high:g}: '
                             'expected 8 or 16 bits a pixel')
        picture = picture.convert('I').point(eight_bits).convert('L')
    return picture.convert('RGB')


def eight_bits(level):
    """A level of 16 bits as one of 8."""
    return level / 257 + 0.5


def squared(picture, side, fit, border):
    """An RGB picture as a square of `side` pixels.

    fit: 'squash', out of shape; 'crop', the middle; 'pad', all of it in shape, between bars of the colour
    `border`.
    Raises: ValueError.
    """
    w, h = picture.size
    if fit == 'squash':
        size = (side, side)
    elif fit == 'crop':  # the short side becomes `side`; cut down, as CLIP's own preprocessing does
        size = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    elif fit == 'pad':  # the long side becomes `side`
        size = (max(1, round(side * w / h)), side) if w <= h else (side, max(1, round(side * h / w)))
    else:
        raise ValueError(f'fit={fit}: expected squash, crop or pad')
    if size[0] * size[1] > 2 ** 26:
        raise ValueError(f'{w} x {h} pixels are too long and thin to be cropped to a square')
    if picture.size != size:
        picture = picture.resize(size, Image.BICUBIC)
    if fit == 'crop':
        left = (picture.width - side) // 2
        top = (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))
    if fit == 'pad':
        square = Image.new('RGB', (side, side), border)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square
    return picture


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
