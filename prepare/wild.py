"""
Wild: pictures of the same shapes that other programs draw, with the same questions, to see whether a model
that learnt from prepare/shapes.py knows shapes, or only that one's drawings. None are to train on.

    python data.py wild    # data/wild: val drawn with NumPy, to choose by; test with matplotlib

Against the varied pictures that train.py draws, forms, colours, shading, grounds and edges all differ.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from prepare._looks import as_file
from prepare.shapes import Config as ShapesConfig
from prepare.shapes import draw_scene, shapes_rows, sheet_of

try:
    import matplotlib
    from matplotlib import patches
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None

COLORS = {  # by matplotlib's names
    'red': ('red', 'crimson', 'firebrick', 'tab:red'),
    'green': ('green', 'limegreen', 'forestgreen', 'tab:green'),
    'blue': ('blue', 'royalblue', 'mediumblue', 'tab:blue'),
    'yellow': ('yellow', 'gold'),
    'purple': ('purple', 'darkviolet', 'tab:purple'),
    'cyan': ('cyan', 'darkturquoise', 'tab:cyan'),
    'brown': ('saddlebrown', 'sienna', 'tab:brown'),
    'gray': ('gray', 'darkgray', 'dimgray', 'tab:gray'),
}
GROUNDS = ('white', 'black', 'whitesmoke', 'lightblue', 'beige', 'mistyrose', 'darkslategray', 'midnightblue',
           'darkolivegreen', 'indigo', 'thistle', 'orange', 'pink', 'palegreen', 'lavender', 'maroon')
APART = 0.4  # least distance of a fill from the ground, in RGB from 0 to 1


@dataclass
class Config:
    out: str = 'data/wild'  # folder to write the dataset to
    n_val: int = 500        # pictures in val.parquet; about eight questions each
    n_test: int = 500       # pictures in test.parquet
    seed: int = 1337        # the same seed draws the same pictures
    show: bool = False      # draw a contact sheet, wild.png, and nothing else

    def __post_init__(self):
        if min(self.n_val, self.n_test) < 0:
            raise ValueError(f'n_val={self.n_val}, n_test={self.n_test}: expected 0 or more')
        if matplotlib is None:
            raise ValueError('wild: matplotlib draws these pictures, and it is not here; '
                             'pip install matplotlib')


def rows(config):
    """Yields (split, row), see prepare/shapes.py."""
    shapes = ShapesConfig(seed=config.seed)
    for split, n in dict(val=config.n_val, test=config.n_test).items():
        for row in shapes_rows(shapes, f'wild {split}', 0, n, draw=draw_wild):
            yield split, row


def contact_sheet(config):
    """Draws pictures of both splits with their questions and answers, to look at -> a Pillow picture."""
    few = replace(config, n_val=12, n_test=12)
    return sheet_of([row for _, row in rows(few)], ShapesConfig().image_px)


def draw_wild(rng, shapes, split):
    """-> a scene, and the bytes of its picture"""
    scene = draw_scene(rng, shapes, varied=True)
    fills = [to_rgb(rng.choice(COLORS[o['color']])) for o in scene]
    grounds = [to_rgb(name) for name in rng.sample(GROUNDS, len(GROUNDS))]
    # of 16 grounds, the first one that all objects stand out from, or else the one that does best
    distances = [min(math.dist(ground, fill) for fill in fills) for ground in grounds]
    ground = next((g for g, d in zip(grounds, distances) if d > APART), grounds[np.argmax(distances)])
    draw = by_numpy if split == 'wild val' else by_matplotlib
    return scene, as_file(draw(scene, fills, ground, rng, shapes.image_px))


def by_numpy(scene, fills, ground, rng, image_px):
    """Every pixel by its distance from the edges; fills are lighter above and grounds have squares, as a
    tablecloth has. -> a Pillow picture"""
    side = rng.randint(60, 320)
    zoom = side / image_px
    y, x = np.mgrid[:side, :side] / zoom                               # (side, side) both
    cell = rng.uniform(4, 24)
    cloth = (x // cell + y // cell) % 2                                # (side, side)
    strength = rng.uniform(0, .1) * (1 if sum(ground) < 1.5 else -1)
    picture = np.array(ground) + strength * cloth[..., None]           # (side, side, 3)
    for o, fill in zip(scene, fills):
        angle = math.radians(rng.uniform(-12, 12))
        dx = (x - o['x']) / o['r']
        dy = (y - o['y']) / o['r']
        u = math.cos(angle) * dx + math.sin(angle) * dy
        v = math.cos(angle) * dy - math.sin(angle) * dx
        if o['shape'] == 'circle':
            outside = np.hypot(u, v) - 1
        elif o['shape'] == 'square':
            outside = np.maximum(abs(u), abs(v)) - .85
        elif o['shape'] == 'triangle':  # its base, and its sides
            outside = np.maximum(v - .8, (1.8 * abs(u) - v - 1) / 2.06)
        elif o['shape'] == 'cross':
            bars = np.maximum(abs(u) - 1, abs(v) - .3), np.maximum(abs(u) - .3, abs(v) - 1)
            outside = np.minimum(*bars)
        else:
            raise ValueError(f"shape {o['shape']!r} cannot be drawn")
        cover = (.5 - outside * o['r'] * zoom).clip(0, 1)[..., None]   # (side, side, 1)
        lit = np.array(fill) * (1 - .15 * v.clip(-1, 1))[..., None]    # (side, side, 3)
        picture += cover * (lit - picture)
    return Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8))


def by_matplotlib(scene, fills, ground, rng, image_px):
    """matplotlib's patches with outlines, on an even ground or on one that is lighter in the middle.
    -> a Pillow picture"""
    side = rng.randint(60, 400)
    figure = Figure(figsize=(side / 100, side / 100), dpi=100, facecolor=ground)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, image_px)
    axes.set_ylim(image_px, 0)
    axes.axis('off')
    if rng.random() < .5:
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        glow = .12 * (1 - np.hypot(x, y))[..., None]                   # (64, 64, 1)
        axes.imshow((np.array(ground) + glow).clip(0, 1), extent=(0, image_px, image_px, 0))
    thickness = rng.choice((0, .5, 1)) * side / 100
    edge = rng.choice(('black', 'white', 'dimgray'))
    for o, fill in zip(scene, fills):
        center = o['x'], o['y']
        r = o['r']
        look = dict(facecolor=fill, edgecolor=edge, linewidth=min(thickness, .2 * r * side / image_px))
        turn = rng.uniform(-12, 12)
        if o['shape'] == 'circle':
            patch = patches.Circle(center, r, **look)
        elif o['shape'] == 'square':
            corner = o['x'] - .85 * r, o['y'] - .85 * r
            patch = patches.Rectangle(corner, 1.7 * r, 1.7 * r, angle=turn, rotation_point='center', **look)
        elif o['shape'] == 'triangle':  # y grows downwards: the corner that would point up is turned there
            up = math.pi + math.radians(turn)
            patch = patches.RegularPolygon(center, 3, radius=1.1 * r, orientation=up, **look)
        elif o['shape'] == 'cross':
            thin = .3 * r
            corners = [(-thin, -r), (thin, -r), (thin, -thin), (r, -thin), (r, thin), (thin, thin), (thin, r),
                       (-thin, r), (-thin, thin), (-r, thin), (-r, -thin), (-thin, -thin)]
            patch = patches.Polygon([(o['x'] + dx, o['y'] + dy) for dx, dy in corners], **look)
        else:
            raise ValueError(f"shape {o['shape']!r} cannot be drawn")
        axes.add_patch(patch)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
