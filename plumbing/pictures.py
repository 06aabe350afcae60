"""Picture files: decoded safely, and put together on sheets to look at."""

import io
import struct
import zlib

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from plumbing.console import printable

# no others: to decode EPS Pillow starts a program that runs what is in it
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')

UNREADABLE = (
    OSError,
    SyntaxError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


def open_picture(data, most_pixels=2**26):
    """Decodes a picture file completely. Raises: ValueError where it is no picture, is cut off, moves, or is
    gigantic: its kind, a colon, the details."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > most_pixels:
            raise ValueError(f'more than {most_pixels} pixels: {picture.width} x {picture.height}')
        # MPO: a photograph with a preview
        if getattr(picture, 'is_animated', False) and picture.format != 'MPO':
            raise ValueError(f'animated: {picture.n_frames} frames')
        picture.load()
        return picture
    except Image.DecompressionBombError as e:
        raise ValueError(f'more than {most_pixels} pixels: {e}') from None
    except UnidentifiedImageError:
        raise ValueError('not a picture: of no known format') from None
    except UNREADABLE as e:  # what Pillow raises for a bad file
        raise ValueError(f'not a picture that can be decoded: {e or type(e).__name__}') from None


def picture_sheet(tiles, columns=6, scale=3, colors=None):
    """A sheet of pictures with lines of text under them, drawn with Pillow. tiles: [(picture, [line, ...]),
    ...]."""
    font, pad, line_px = ImageFont.load_default(13), 8, 17
    width = max(200, scale * max(p.width for p, _ in tiles))
    wrapped = [[part for line in lines for part in wrap(line, font, width)] for _, lines in tiles]
    height = scale * max(p.height for p, _ in tiles) + line_px * max(map(len, wrapped)) + 4
    sheet = Image.new(
        'RGB', (columns * (width + pad) + pad, -(-len(tiles) // columns) * (height + pad) + pad), 'white'
    )
    draw = ImageDraw.Draw(sheet)
    for k, ((picture, _), lines) in enumerate(zip(tiles, wrapped)):
        x, y = pad + k % columns * (width + pad), pad + k // columns * (height + pad)
        picture = picture.convert('RGB')
        sheet.paste(picture.resize((scale * picture.width, scale * picture.height), Image.NEAREST), (x, y))
        for i, line in enumerate(lines):
            draw.text(
                (x, y + scale * picture.height + 2 + line_px * i),
                line,
                colors[k] if colors else 'black',
                font,
            )
    return sheet


def wrap(line, font, width):
    lines = ['']
    for word in printable(line).split(' '):
        if lines[-1] and font.getlength(f'{lines[-1]} {word}') > width:
            lines.append('')
        lines[-1] = f'{lines[-1]} {word}'.strip()
    return lines


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
            raise ValueError(
                f'a grey picture of mode {picture.mode} with values from {low:g} to {high:g}: '
                'expected 8 or 16 bits a pixel'
            )
        picture = picture.convert('I').point(eight_bits).convert('L')
    return picture.convert('RGB')


def eight_bits(level):
    """A level of 16 bits as one of 8."""
    return level / 257 + 0.5
