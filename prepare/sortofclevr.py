"""
Sort-of-CLEVR: 75 x 75 pictures of six objects, each of its own colour, square or circle; ten relational
questions and ten others about each of 10,000. Drawn here, after Santoro et al. 2017, arXiv 1706.01427;
nothing is downloaded, and no code is taken over.

What the paper leaves open is as in the public generators (github.com/kimhc6028/relational-networks): objects
are 11 pixels wide, the middle of the picture parts left from right and top from bottom, and a count leaves
out the object that is named (0 to 5). Other than there, questions are words; the ten of a kind differ, of 18;
no corners overlap; no two objects are equally far from a third; and 300 pictures are for validation, taken
from those to train on.
"""

import io
import random
from dataclasses import dataclass
from itertools import combinations

from PIL import Image, ImageDraw

COLORS = {
    'red': (255, 0, 0),
    'green': (0, 255, 0),
    'blue': (0, 0, 255),
    'orange': (255, 156, 0),
    'gray': (128, 128, 128),
    'yellow': (255, 255, 0),
}
SIDE = 75  # of the picture, in pixels
R = 5      # from an object's centre to its edge, in pixels


@dataclass
class Config:
    out: str = 'data/sortofclevr'  # folder to write the dataset to
    n_train: int = 9500            # pictures in train.parquet; twenty questions each
    n_val: int = 300               # pictures in val.parquet
    n_test: int = 200              # pictures in test.parquet
    seed: int = 1337               # the same seed draws the same dataset, byte for byte

    def __post_init__(self):
        if min(self.n_train, self.n_val, self.n_test) < 0:
            raise ValueError(f'n_train={self.n_train}, n_val={self.n_val}, n_test={self.n_test}: expected 0 '
                             f'or more')


def rows(config):
    """Yields (split, row); a row's type is relational or non-relational. A picture is a pure function of
    (seed, split, its number)."""
    for split, n in dict(train=config.n_train, val=config.n_val, test=config.n_test).items():
        for i in range(n):
            rng = random.Random(f'{config.seed}/{split}/{i}')
            scene = draw_scene(rng)
            file = io.BytesIO()
            draw_picture(scene).save(file, 'PNG')
            for type, ask in (('relational', ask_relational), ('non-relational', ask_non_relational)):
                asked = rng.sample([both for o in scene for both in ask(o, scene)], 10)
                for k, (question, answer) in enumerate(asked):
                    yield split, dict(
                        image=file.getvalue(),
                        question=question,
                        answer=answer,
                        type=type,
                        sample_id=f'{split}-{i}-{type}-{k}',
                    )


def draw_scene(rng):
    """Six objects, a pixel apart at least. Units: x, y (centre) in pixels."""
    while True:  # six or seven times, mostly because two are too near each other
        scene = []
        for color in COLORS:
            shape = rng.choice(('square', 'circle'))
            x = rng.randint(R, SIDE - 1 - R)
            y = rng.randint(R, SIDE - 1 - R)
            scene.append(dict(color=color, shape=shape, x=x, y=y))
        if not all(are_apart(a, b) for a, b in combinations(scene, 2)):
            continue
        if all(has_order(a, scene) for a in scene):
            return scene


def are_apart(a, b):
    return max(abs(a['x'] - b['x']), abs(a['y'] - b['y'])) > 2 * R + 1


def has_order(a, scene):
    """Whether no two objects are equally far from this one, so that closest and furthest are clear."""
    return len({far(a, b) for b in scene}) == len(scene)


def far(a, b):
    return (a['x'] - b['x']) ** 2 + (a['y'] - b['y']) ** 2


def draw_picture(scene):
    picture = Image.new('RGB', (SIDE, SIDE), 'white')
    draw = ImageDraw.Draw(picture)
    for o in scene:
        box = (o['x'] - R, o['y'] - R, o['x'] + R, o['y'] + R)
        if o['shape'] == 'square':
            draw.rectangle(box, COLORS[o['color']])
        else:
            draw.ellipse(box, COLORS[o['color']])
    return picture


def ask_relational(o, scene):
    others = sorted((b for b in scene if b is not o), key=lambda b: far(o, b))
    color = o['color']
    n_alike = sum(b['shape'] == o['shape'] for b in others)
    return [
        (f'what shape is the object closest to the {color} one?', others[0]['shape']),
        (f'what shape is the object furthest from the {color} one?', others[-1]['shape']),
        (f'how many other objects have the shape of the {color} one?', str(n_alike)),
    ]


def ask_non_relational(o, scene):
    color = o['color']
    return [
        (f'what shape is the {color} object?', o['shape']),
        (f'is the {color} object on the left of the picture?', 'yes' if o['x'] < SIDE / 2 else 'no'),
        (f'is the {color} object at the top of the picture?', 'yes' if o['y'] < SIDE / 2 else 'no'),
    ]
