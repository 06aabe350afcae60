"""
Shapes: pictures of coloured shapes with questions and captions, drawn from a seed; nothing is read or
    downloaded.

In reading order: scenes, pictures and captions; questions, whose answers are balanced so that a blind model
gains little; the data set, drawn on all cores; captions for the alignment, drawn while it trains. `python
data.py shapes --show=true` draws a contact sheet to look at.
"""

import io
import math
import multiprocessing
import os
import random
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import permutations, repeat

from PIL import Image, ImageDraw

from plumbing.pictures import picture_sheet
from plumbing.tables import write_dataset

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
SHAPES = ('circle', 'square', 'triangle', 'cross')
SIZES = {'small': 4.5, 'big': 7.5}  # name -> half width in pixels
SIDES = ('left of', 'right of', 'above', 'below')


@dataclass
class Config:
    out: str = 'data/shapes'  # folder to write the dataset to
    n_train: int = 24000  # pictures in train.parquet; about eight questions each
    n_val: int = 1000  # pictures in val.parquet
    n_test: int = 1000  # pictures in test.parquet
    image_px: int = 64  # side of the square picture, in pixels
    min_objects: int = 2  # objects in a picture, at least
    max_objects: int = 6  # objects in a picture, at most; (colour, shape) pairs are unique, so 32 is the end
    types: str = 'color,shape,exist,count,compare,relation,hops'  # of questions, by commas; or swaps alone
    max_hops: int = 2  # longest chain of relations asked for, up to 8
    max_swaps: int = 4  # with types=swaps: the most pairs of objects that trade places, up to 8
    train_swaps: int | None = None  # the same in train and val; None: max_swaps
    describe: float = 0.1  # share of the pictures that also ask for their caption
    seed: int = 1337  # the same seed draws the same dataset, byte for byte
    show: bool = False  # draw a contact sheet, shapes.png, and nothing else

    def __post_init__(self):
        if min(self.n_train, self.n_val, self.n_test) < 0 or not 0 <= self.describe <= 1:
            raise ValueError(
                f'n_train={self.n_train}, n_val={self.n_val}, n_test={self.n_test}, '
                f'describe={self.describe}: expected 0 or more, and a share of 0 to 1'
            )
        if not 1 <= self.min_objects <= self.max_objects <= len(COLORS) * len(SHAPES):
            raise ValueError(
                f'min_objects={self.min_objects}, max_objects={self.max_objects}: expected '
                f'1 <= min_objects <= max_objects <= {len(COLORS) * len(SHAPES)}'
            )
        if not 1 <= self.max_hops <= 8:
            raise ValueError(f'max_hops={self.max_hops}: expected 1 to 8')
        if self.train_swaps is None:
            self.train_swaps = self.max_swaps
        if not 0 <= self.train_swaps <= self.max_swaps <= 8:
            raise ValueError(
                f'train_swaps={self.train_swaps}, max_swaps={self.max_swaps}: expected 0 <= train_swaps <= '
                f'max_swaps <= 8'
            )
        for type in self.types.split(',') if self.types != 'swaps' else ():
            if type not in (*ASK, 'hops'):
                raise ValueError(
                    f'types={self.types}: {type!r} is none of {", ".join(ASK)}, hops; or swaps alone'
                )
        if self.types == 'swaps' and not 3 <= self.min_objects <= self.max_objects <= len(COLORS):
            raise ValueError(
                f'min_objects={self.min_objects}, max_objects={self.max_objects}: with types=swaps expected '
                f'3 <= min_objects <= max_objects <= {len(COLORS)}'
            )
        if self.image_px < 32:
            raise ValueError(
                f'image_px={self.image_px}: expected at least 32, the objects are up to 15 pixels wide'
            )


def draw_scene(rng, config):
    """A random scene: objects with unique (colour, shape) pairs, at free positions, two pixels apart at
    least; with types='swaps' of different colours and in columns of their own.

    Units: x, y (centre) and r (half width) in pixels.
    Raises: ValueError when `max_objects` do not fit into `image_px`.
    """
    n = rng.randint(config.min_objects, config.max_objects)
    pairs = (
        rng.sample([(c, s) for c in COLORS for s in SHAPES], n)
        if config.types != 'swaps'
        else [(c, rng.choice(SHAPES)) for c in rng.sample(tuple(COLORS), n)]
    )
    for _ in range(100):  # a crowded draw starts over
        scene = []
        for k, (color, shape) in enumerate(pairs):
            size = rng.choice(tuple(SIZES))
            r = SIZES[size]
            for _ in range(50):
                x, y = (rng.uniform(r + 1, config.image_px - r - 1) for _ in 'xy')
                if config.types == 'swaps':  # in the middle half of its column
                    x = 8.5 + (config.image_px - 17) * (k + rng.uniform(0.25, 0.75)) / n
                if all(math.hypot(x - o['x'], y - o['y']) > r + o['r'] + 2 for o in scene):
                    scene.append(dict(color=color, shape=shape, size=size, x=x, y=y, r=r))
                    break
        if len(scene) == n:
            return scene
    raise ValueError(
        f'max_objects={config.max_objects} objects do not fit into image_px={config.image_px}: '
        f'lower max_objects or raise image_px'
    )


def draw_picture(scene, rng, image_px):
    """Draws a scene with Pillow, drawn at twice the size and reduced, on a pale ground, colours a little
    off."""

    def jitter(rgb, by):
        return tuple(min(255, max(0, v + rng.randint(-by, by))) for v in rgb)

    picture = Image.new('RGB', (2 * image_px, 2 * image_px), jitter((236, 236, 236), 16))
    draw = ImageDraw.Draw(picture)
    for o in scene:
        x, y, r, fill = 2 * o['x'], 2 * o['y'], 2 * o['r'], jitter(COLORS[o['color']], 10)
        if o['shape'] == 'circle':
            draw.ellipse((x - r, y - r, x + r, y + r), fill)
        elif o['shape'] == 'square':
            draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
        elif o['shape'] == 'triangle':
            draw.polygon((x, y - r, x - r, y + 0.8 * r, x + r, y + 0.8 * r), fill)
        else:
            draw.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill)
            draw.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill)
    return picture.reduce(2)


def name(o):
    return f"{o['color']} {o['shape']}"


def describe(scene):
    """The caption that the `describe` questions ask for: every object, from left to right."""
    parts = [f"a {o['size']} {name(o)}" for o in sorted(scene, key=lambda o: o['x'])]
    return ' and '.join([', '.join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


def locate(scene, rng, image_px, n=4):
    """Phrases to align the encoder with: `n` objects, repeated if there are fewer, each with its place on a
    16 x 16 board.

    'big red circle at e12' stands in the fifth column and the twelfth row, counted from the top left.
    """
    objects = rng.sample(scene, len(scene))
    for o in (objects * n)[:n]:
        column, row = (int(o[axis] * 16 / image_px) for axis in 'xy')
        yield f"{o['size']} {name(o)} at {'abcdefghijklmnop'[column]}{row + 1}"


# ----------------------------------------------------------------------------
# shapes: questions. Every type lists all the questions that a scene allows, as (question, answer) pairs.


def side_of(a, b):
    """The side of object a on which object b lies, or None where that is doubtful (within 10 degrees of a
    diagonal)."""
    dx, dy = b['x'] - a['x'], b['y'] - a['y']
    if abs(math.degrees(math.atan2(abs(dy), abs(dx))) - 45) < 10:
        return None
    return SIDES[dx > 0] if abs(dx) > abs(dy) else SIDES[2 + (dy > 0)]


def only_neighbours(scene):
    """For every object and side: the index of the only object on that side; nothing where a doubtful object
    could be meant."""
    edges = []
    for a in scene:
        found = {side: [] for side in SIDES}
        for j, b in enumerate(scene):
            if b is not a:
                side = side_of(a, b)
                for s in [side] if side else [SIDES[b['x'] > a['x']], SIDES[2 + (b['y'] > a['y'])]]:
                    found[s].append((j, side))
        edges.append(
            {side: objects[0][0] for side, objects in found.items() if len(objects) == 1 and objects[0][1]}
        )
    return edges


def unique(scene, key):
    counts = Counter(o[key] for o in scene)
    return [o for o in scene if counts[o[key]] == 1]


def ask_color(scene):
    return [(f"what color is the {o['shape']}?", o['color']) for o in unique(scene, 'shape')]


def ask_shape(scene):
    return [(f"what shape is the {o['color']} object?", o['shape']) for o in unique(scene, 'color')]


def ask_exist(scene):
    """Absent pairs are made of a colour and a shape that are both there."""
    present = {(o['color'], o['shape']) for o in scene}
    return [
        (f'is there a {c} {s}?', 'yes' if (c, s) in present else 'no')
        for c in dict.fromkeys(o['color'] for o in scene)
        for s in dict.fromkeys(o['shape'] for o in scene)
    ]


def group_counts(scene):
    """How many objects of each shape, colour and size there are, under the words a question uses: {key:
    {words: count}}."""
    return {
        'shape': {s + 's': sum(o['shape'] == s for o in scene) for s in SHAPES if s != 'cross'}
        | {'crosses': sum(o['shape'] == 'cross' for o in scene)},
        'color': {c + ' objects': sum(o['color'] == c for o in scene) for c in COLORS},
        'size': {z + ' objects': sum(o['size'] == z for o in scene) for z in SIZES},
    }


def ask_count(scene):
    return [
        (f'how many {words} are there?', str(count))
        for counts in group_counts(scene).values()
        for words, count in counts.items()
    ]


def ask_compare(scene):
    """Two groups of the same kind, both present; a draw is a no."""
    return [
        (f'are there more {a} than {b}?', 'yes' if m > n else 'no')
        for counts in group_counts(scene).values()
        for a, m in counts.items()
        for b, n in counts.items()
        if a != b and m and n
    ]


def ask_relation(scene):
    return [
        (f'is the {name(a)} {side} the {name(b)}?', 'yes' if side_of(b, a) == side else 'no')
        for a in scene
        for b in scene
        if a is not b and side_of(b, a)
        for side in SIDES
    ]


def ask_hops(scene, hops):
    """Follow `hops` sides from a named object to another; no object is visited twice."""
    edges = only_neighbours(scene)
    paths = [([i], f'the {name(o)}') for i, o in enumerate(scene)]
    for _ in range(hops):
        paths = [
            (visited + [j], f'the object {side} {words}')
            for visited, words in paths
            for side, j in edges[visited[-1]].items()
            if j not in visited
        ]
    return [
        (f'what {key} is {words}?', scene[visited[-1]][key])
        for visited, words in paths
        for key in ('color', 'shape')
    ]


def ask_swaps(scene, swaps, most=20):
    """The objects, counted from the left, trade places in pairs, never the same two at once again. Which is
    then at a place? `most` of all such stories."""
    rng, told = random.Random(f'{describe(scene)}, {swaps} swaps'), {}
    for _ in range(most):
        row, pairs, last, place = sorted(scene, key=lambda o: o['x']), [], (), rng.randrange(len(scene))
        for _ in range(swaps):
            i, j = rng.choice([p for p in permutations(range(len(row)), 2) if {*p} != {*last}])
            row[i], row[j], last = row[j], row[i], (i, j)
            pairs.append(f'{i + 1} {j + 1}')
        told[
            f"{'swap ' if swaps else ''}{', '.join(pairs)}{': ' if swaps else ''}what color is number "
            f"{place + 1}?"
        ] = row[place]['color']
    return list(told.items())


ASK = {
    'color': ask_color,
    'shape': ask_shape,
    'exist': ask_exist,
    'count': ask_count,
    'compare': ask_compare,
    'relation': ask_relation,
}


def plural(n, word):
    return f"{n} {word}{'s' * (n != 1)}"


def shapes_rows(config, split, start, n):
    """The rows of pictures `start` to `start + n` of a split: one question of every type that the scene
    allows, and the caption of some. Balance: of a type's questions, one is asked whose answer was given least
    so far, so a blind guess gains little. Fewer scenes have long chains, so those that do are asked for two
    of them; two stories of swaps are told of each length.
    """
    wanted = config.types.split(',')
    ask = {type: questions for type, questions in ASK.items() if type in wanted}
    if 'hops' in wanted:
        ask |= {plural(h, 'hop'): partial(ask_hops, hops=h) for h in range(1, config.max_hops + 1)}
    if 'swaps' in wanted:
        most = config.max_swaps if split == 'test' else config.train_swaps
        ask |= {plural(k, 'swap'): partial(ask_swaps, swaps=k) for k in range(most + 1)}
    given, rows = {type: Counter() for type in ask}, []
    for i in range(start, start + n):
        rng = random.Random(f'{config.seed}/{split}/{i}')
        scene = draw_scene(rng, config)
        buffer = io.BytesIO()
        draw_picture(scene, rng, config.image_px).save(buffer, 'PNG', compress_level=1)
        picture = dict(image=buffer.getvalue(), caption=describe(scene))
        for type, questions in ask.items():
            candidates = questions(scene)
            for k in range(2 if re.match('[2-9] hops|. swap', type) else 1):
                if candidates:
                    least = min(given[type][answer] for _, answer in candidates)
                    question, answer = rng.choice([qa for qa in candidates if given[type][qa[1]] == least])
                    candidates.remove((question, answer))
                    given[type][answer] += 1
                    rows.append(
                        picture
                        | dict(
                            question=question,
                            answer=answer,
                            type=type,
                            sample_id=f'{split}-{i}-{type}-{k}'.replace(' ', ''),
                        )
                    )
        if rng.random() < config.describe:
            rows.append(
                picture | dict(question=None, answer=None, type='describe', sample_id=f'{split}-{i}-describe')
            )
    return rows


# ----------------------------------------------------------------------------
# the data set


def rows(config, shard=2000):
    """Yields (split, row) for train, val and test, drawn shard by shard on all cores. No scene is in two
    splits: a scene is drawn from its split's name and its number, with places to fractions of a pixel."""
    sizes = dict(train=config.n_train, val=config.n_val, test=config.n_test)
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'), initializer=end_with_parent)
    try:
        shards = {
            split: pool.map(
                shapes_rows,
                repeat(config),
                repeat(split),
                range(0, n, shard),
                [min(shard, n - start) for start in range(0, n, shard)],
            )
            for split, n in sizes.items()
        }
        yield from ((split, row) for split, drawn in shards.items() for some in drawn for row in some)
    finally:
        pool.shutdown(cancel_futures=True)


def draw_shapes(config):
    write_dataset(config.out, rows(config))


def end_with_parent():
    """Lets a worker end when the process that started it ends, and only then: killed, it would else leave the
    worker waiting for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def contact_sheet(config, columns=6, rows=4):
    """Draws pictures with their questions and answers under them, to look at -> a Pillow picture."""
    tiles = {}
    for row in shapes_rows(config, 'train', 0, columns * rows):
        _, lines = tiles.setdefault(row['image'], (Image.open(io.BytesIO(row['image'])), []))
        lines.append(f"{row['question']} {row['answer']}" if row['question'] else row['caption'])
    return picture_sheet(list(tiles.values()), columns, scale=3)
