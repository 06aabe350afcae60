"""
How a scene of shapes is drawn: plainly, always the same way; or with variety, so that a model that learns
from it also knows pictures that somebody else has drawn.

Plain pictures have a pale ground. Varied ones have 48 to 512 pixels, a ground of any colour, even, sloping or
grainy, objects of any size that fits, turned a little, some with an outline, and most are JPEG files.
"""

import io
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

COLORS = {  # name -> RGB; the eight colours of CLEVR
    'red': (220, 40, 40),
    'green': (40, 160, 60),
    'blue': (45, 75, 215),
    'yellow': (235, 205, 40),
    'purple': (140, 50, 180),
    'cyan': (50, 200, 205),
    'brown': (130, 80, 40),
    'gray': (125, 125, 125),
}
ALSO = {  # name -> RGB of what else goes by it; most are HTML's
    'red': [(255, 0, 0), (178, 25, 30)],
    'green': [(0, 128, 0), (0, 255, 0), (80, 180, 80)],
    'blue': [(0, 0, 255), (30, 100, 220), (20, 30, 140)],
    'yellow': [(255, 255, 0), (255, 220, 0)],
    'purple': [(128, 0, 128), (150, 70, 220)],
    'cyan': [(0, 255, 255), (0, 190, 200)],
    'brown': [(139, 69, 19), (101, 60, 30)],
    'gray': [(128, 128, 128), (150, 150, 150), (95, 95, 95)],
}
CORNERS = {  # shape -> its corners, in half widths from its centre; a circle has none
    'square': [(-.9, -.9), (.9, -.9), (.9, .9), (-.9, .9)],
    'triangle': [(0, -1), (-1, .8), (1, .8)],
    'cross': [(-.35, -1), (.35, -1), (.35, -.35), (1, -.35), (1, .35), (.35, .35),
              (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35)],
}


def off(rgb, by, rng):
    """A colour, each part a little off."""
    return tuple(min(255, max(0, part + rng.randint(-by, by))) for part in rgb)


def outline_of(o, zoom, turn=0):
    """The corners of a shape in a picture, or those of the box around a circle. Units: `zoom`, pixels of the
    picture for each of the scene; `turn` in degrees, clockwise."""
    if o['shape'] == 'circle':
        corners = [(-1, -1), (1, 1)]
        turn = 0  # or the box would turn
    else:
        corners = CORNERS[o['shape']]
    cos = math.cos(math.radians(turn))
    sin = math.sin(math.radians(turn))
    places = []
    for x, y in corners:
        across = o['x'] + o['r'] * (cos * x - sin * y)
        down = o['y'] + o['r'] * (sin * x + cos * y)
        places.append((zoom * across, zoom * down))
    return places


def draw_object(draw, o, zoom, fill, turn=0, outline=None, width=0):
    places = outline_of(o, zoom, turn)
    if o['shape'] == 'circle':
        draw.ellipse(places, fill, outline, width)
    else:
        draw.polygon(places, fill, outline, max(1, width))


def draw_plain(scene, rng, image_px):
    """A scene on a pale ground, colours a little off; drawn at twice the size and reduced."""
    ground = off((236, 236, 236), 16, rng)
    picture = Image.new('RGB', (2 * image_px, 2 * image_px), ground)
    draw = ImageDraw.Draw(picture)
    for o in scene:
        draw_object(draw, o, 2, off(COLORS[o['color']], 10, rng))
    return picture.reduce(2)


# ----------------------------------------------------------------------------
# variety

def draw_varied(scene, rng, image_px):
    """A scene in a look of its own, see the top of the page. -> a square picture of 48 to 512 pixels"""
    side = round(48 * (512 / 48) ** rng.random() ** 1.5)       # more small ones, which cost less
    fills = [some_fill(o['color'], rng) for o in scene]
    finer = 2 if side < 160 else 1                 # large pictures get reduced later, which smooths them
    picture = some_ground(fills, finer * side, rng)
    draw = ImageDraw.Draw(picture)
    zoom = finer * side / image_px
    most_turn = rng.choice([0, 0, 15])             # degrees
    line = rng.choice([None, None, (0, 0, 0), (255, 255, 255), (40, 40, 40)])
    thin = rng.uniform(.05, .2)                    # of a half width
    for o, fill in zip(scene, fills):
        width = max(1, round(thin * o['r'] * zoom)) if line else 0
        draw_object(draw, o, zoom, fill, rng.uniform(-most_turn, most_turn), line, width)
    return grainy(picture.reduce(finer), rng)


def some_fill(name, rng):
    """A colour that goes by this name."""
    a = rng.choice([COLORS[name], *ALSO[name]])
    b = rng.choice([COLORS[name], *ALSO[name]])
    t = rng.random()
    mixed = [round(t * x + (1 - t) * y) for x, y in zip(a, b)]
    return off(mixed, 10, rng)


def some_ground(fills, side, rng):
    """A ground, even or sloping to another colour, from which all fills stand out. -> a picture"""
    sloping = rng.random() < .5
    apart = 100  # in RGB, whose corners are 255 apart
    while True:
        first = rng.choice([(255, 255, 255), (0, 0, 0), (rng.randint(0, 255),) * 3,
                            *[tuple(rng.randint(0, 255) for _ in range(3))] * 3])
        last = off(first, 70, rng) if sloping else first
        middle = tuple((a + b) // 2 for a, b in zip(first, last))
        if all(math.dist(ground, fill) > apart for ground in (first, middle, last) for fill in fills):
            break
        apart *= .97  # with many colours in the picture there may be no such ground
    if not sloping:
        return Image.new('RGB', (side, side), first)
    slope = Image.new('RGB', (2, 2), middle)
    ends = rng.choice([((0, 0), (1, 1)), ((1, 0), (0, 1))])
    slope.putpixel(ends[0], first)
    slope.putpixel(ends[1], last)
    return slope.resize((side, side), Image.BILINEAR)


def grainy(picture, rng):
    """With noise, fine or coarse; half of the pictures have none."""
    if rng.random() < .5:
        return picture
    side = picture.width
    grains = round(8 * (min(side, 128) / 8) ** rng.random())   # along a side
    noise = np.random.default_rng(rng.getrandbits(64)).normal(128, rng.uniform(2, 12), (grains, grains, 3))
    noise = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((side, side), Image.BILINEAR)
    return ImageChops.add(picture, noise, 1, -128)


def as_file(picture, rng=None):
    """The bytes of a PNG file; with `rng`, for half of the pictures and all large ones, of a JPEG file."""
    file = io.BytesIO()
    if rng and (picture.width > 128 or rng.random() < .5):
        picture.save(file, 'JPEG', quality=rng.randint(50, 95))
    else:
        picture.save(file, 'PNG', compress_level=1)
    return file.getvalue()
