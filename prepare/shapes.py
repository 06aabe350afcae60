"""
Shapes: pictures of coloured shapes with questions and captions, drawn from a seed; nothing is read or
downloaded.

In reading order: scenes, pictures and captions; questions, whose answers are balanced so that a blind model
gains little; the dataset, drawn on all cores. `python data.py shapes --show=true` draws a contact sheet to
look at. A new type of question is a function and an entry in ASK; `--types=NAME` asks it.
"""

import math
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import permutations, repeat
from operator import itemgetter

from plumbing.pictures import picture_sheet, rgb_picture, squared
from plumbing.tables import write_dataset
from prepare._looks import COLORS, as_file, draw_plain, draw_varied

SHAPES = ('circle', 'square', 'triangle', 'cross')
SIZES = {'small': 4.5, 'big': 7.5}  # name -> half width in pixels; in a varied picture in proportion
SCALES = 0.55, 3.0                  # of all objects of a varied picture
SIDES = ('left of', 'right of', 'above', 'below')


@dataclass
class Config:
    out: str = 'data/shapes'  # folder to write the dataset to
    n_train: int = 8000       # pictures in train.parquet
    n_val: int = 1000         # pictures in val.parquet
    n_test: int = 1000        # pictures in test.parquet
    image_px: int = 64        # side of the square picture, in pixels
    min_objects: int = 2      # objects in a picture, at least
    max_objects: int = 6      # objects in a picture, at most; (colour, shape) pairs are unique, so up to 32
    types: str = 'color,shape,exist,count,count,compare,relation,relation,hops'  # asked; or swaps alone
    max_hops: int = 2         # longest chain of relations asked for, up to 8
    max_swaps: int = 4        # with types=swaps: the most pairs of objects that trade places, up to 8
    train_swaps: int | None = None  # the same in train and val; None: max_swaps
    variety: float = 0.5      # share of the training pictures in varied styles: prepare/_looks.py
    asked: int = 2            # questions about a training picture each time its type stands in types; else 1
    describe: float = 0.6     # share of the pictures that also ask for their caption
    seed: int = 1337          # the same seed draws the same dataset, byte for byte
    show: bool = False        # draw a contact sheet, shapes.png, and nothing else

    def __post_init__(self):
        objects = f'min_objects={self.min_objects}, max_objects={self.max_objects}'
        if self.asked < 1:
            raise ValueError(f'asked={self.asked}: expected 1 or more')
        if min(self.n_train, self.n_val, self.n_test) < 0:
            raise ValueError(f'n_train={self.n_train}, n_val={self.n_val}, n_test={self.n_test}: expected 0 '
                             f'or more')
        for key in ('variety', 'describe'):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected a share, 0 to 1')
        if not 1 <= self.min_objects <= self.max_objects <= len(COLORS) * len(SHAPES):
            raise ValueError(f'{objects}: expected 1 <= min_objects <= max_objects <= '
                             f'{len(COLORS) * len(SHAPES)}')
        if not 1 <= self.max_hops <= 8:
            raise ValueError(f'max_hops={self.max_hops}: expected 1 to 8')
        if self.train_swaps is None:
            self.train_swaps = self.max_swaps
        if not 0 <= self.train_swaps <= self.max_swaps <= 8:
            raise ValueError(f'train_swaps={self.train_swaps}, max_swaps={self.max_swaps}: expected '
                             f'0 <= train_swaps <= max_swaps <= 8')
        if self.types == 'swaps':  # every object needs a colour and a column of its own
            if not 3 <= self.min_objects <= self.max_objects <= len(COLORS):
                raise ValueError(f'{objects}: with types=swaps expected 3 <= min_objects <= max_objects <= '
                                 f'{len(COLORS)}')
        else:
            for type in self.types.split(','):
                if type not in (*ASK, 'hops'):
                    raise ValueError(f'types={self.types}: {type!r} is none of {", ".join(ASK)}, hops; or '
                                     f'swaps alone')
        if self.image_px < 32:
            raise ValueError(f'image_px={self.image_px}: expected at least 32, the objects are up to 15 '
                             f'pixels wide')


# ----------------------------------------------------------------------------
# scenes, pictures and captions


def draw_scene(rng, config, varied=False, pairs=None):
    """A random scene: objects with unique (colour, shape) pairs, `pairs` where given, at free positions, two
    pixels apart at least; with types='swaps' of different colours and in columns of their own. In a `varied`
    one all objects are larger or smaller than in others, and so that small and big can be told apart, both
    are there.

    Units: x, y (centre) and r (half width) in pixels.
    Raises: ValueError when `max_objects` do not fit into `image_px`.
    """
    n = len(pairs) if pairs else rng.randint(config.min_objects, config.max_objects)
    if pairs:
        pairs = rng.sample(pairs, n)  # the first ones get the sizes of a varied scene
    elif config.types == 'swaps':
        pairs = [(color, rng.choice(SHAPES)) for color in rng.sample(tuple(COLORS), n)]
    else:
        pairs = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], n)
    scale = 1
    if varied and config.types != 'swaps':  # their columns leave no room for larger ones
        smallest, largest = SCALES
        scale = rng.uniform(smallest, min(largest, 4 * n ** -0.5))  # of many objects large ones do not fit
    for _ in range(100):  # too crowded: draw again, a varied scene with smaller objects
        scene = []
        for k, (color, shape) in enumerate(pairs):
            size = tuple(SIZES)[k] if varied and k < 2 else rng.choice(tuple(SIZES))
            place = free_place(scene, rng, config, k, n, size, scale)
            if place:
                scene.append(dict(color=color, shape=shape, **place))
        if len(scene) == n:
            return scene
        if scale != 1:
            scale *= 0.9
    raise ValueError(f'max_objects={config.max_objects} objects do not fit into image_px={config.image_px}: '
                     f'lower max_objects or raise image_px')


def free_place(scene, rng, config, k, n, size, scale):
    """The size and place of object k of n, where no other object is, or None where none was found."""
    r = SIZES[size] * scale
    for _ in range(50):
        x = rng.uniform(r + 1, config.image_px - r - 1)
        y = rng.uniform(r + 1, config.image_px - r - 1)
        if config.types == 'swaps':  # in the middle half of its column
            x = 8.5 + (config.image_px - 17) * (k + rng.uniform(0.25, 0.75)) / n
        if all(math.hypot(x - o['x'], y - o['y']) > r + o['r'] + 2 for o in scene):
            return dict(size=size, x=x, y=y, r=r)
    return None


def draw_some_scene(rng, config, split):
    """-> a scene, and whether its picture is varied, as `variety` of those of train are"""
    variety = config.variety if split == 'train' else 0
    varied = variety > 0 and rng.random() < variety
    return draw_scene(rng, config, varied), varied


def picture_file(scene, varied, rng, config):
    """-> the bytes of the picture of a scene"""
    if varied:
        return as_file(draw_varied(scene, rng, config.image_px), rng)
    return as_file(draw_plain(scene, rng, config.image_px))


def draw_picture(rng, config, split):
    """-> a scene, and the bytes of its picture"""
    scene, varied = draw_some_scene(rng, config, split)
    return scene, picture_file(scene, varied, rng, config)


def name(o):
    return f"{o['color']} {o['shape']}"


def describe(scene):
    """The caption that the `describe` questions ask for: every object, from left to right."""
    parts = [f"a {o['size']} {name(o)}" for o in sorted(scene, key=lambda o: o['x'])]
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def locate(scene, rng, image_px, n=4):
    """Phrases to align the encoder with: `n` objects, repeated if there are fewer, each with its place on a
    16 x 16 board.

    'big red circle at e12' stands in the fifth column and the twelfth row, counted from the top left.
    """
    objects = rng.sample(scene, len(scene))
    for o in (objects * n)[:n]:
        column = int(o['x'] * 16 / image_px)
        row = int(o['y'] * 16 / image_px)
        yield f"{o['size']} {name(o)} at {'abcdefghijklmnop'[column]}{row + 1}"


# ----------------------------------------------------------------------------
# questions: every type lists all the questions that a scene allows, as (question, answer) pairs.


def side_of(a, b):
    """The side of object a on which object b lies, or None where that is doubtful (within 10 degrees of a
    diagonal)."""
    dx = b['x'] - a['x']
    dy = b['y'] - a['y']
    if abs(math.degrees(math.atan2(abs(dy), abs(dx))) - 45) < 10:
        return None
    return sideways(a, b) if abs(dx) > abs(dy) else upright(a, b)


def sideways(a, b):
    return 'right of' if b['x'] > a['x'] else 'left of'


def upright(a, b):
    return 'below' if b['y'] > a['y'] else 'above'


def only_neighbours(scene):
    """For every object and side: the index of the only object on that side; nothing where a doubtful object
    could be meant."""
    edges = []
    for a in scene:
        found = {side: [] for side in SIDES}  # of each side: (index, whether it is certain)
        for j, b in enumerate(scene):
            if b is a:
                continue
            side = side_of(a, b)
            if side:
                found[side].append((j, True))
            else:  # near a diagonal: it may be meant on either side
                found[sideways(a, b)].append((j, False))
                found[upright(a, b)].append((j, False))
        only = {}
        for side, objects in found.items():
            if len(objects) == 1 and objects[0][1]:
                only[side] = objects[0][0]
        edges.append(only)
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
    words = {
        'shape': {shape: 'crosses' if shape == 'cross' else f'{shape}s' for shape in SHAPES},
        'color': {color: f'{color} objects' for color in COLORS},
        'size': {size: f'{size} objects' for size in SIZES},
    }
    return {key: {text: sum(o[key] == value for o in scene) for value, text in texts.items()}
            for key, texts in words.items()}


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
        longer = []
        for visited, words in paths:
            for side, j in edges[visited[-1]].items():
                if j not in visited:
                    longer.append((visited + [j], f'the object {side} {words}'))
        paths = longer
    return [(f'what {key} is {words}?', scene[visited[-1]][key])
            for visited, words in paths for key in ('color', 'shape')]


def ask_swaps(scene, swaps, most=20):
    """At most `most` stories in which the objects, counted from the left, trade places pair by pair, no pair
    twice in a row. Then: which is at a place?"""
    # by the scene alone: the same stories every time
    rng = random.Random(f'{describe(scene)}, {swaps} swaps')
    stories = {}  # question -> answer
    for _ in range(most):
        row = sorted(scene, key=lambda o: o['x'])
        place = rng.randrange(len(row))
        pairs = []
        last = ()
        for _ in range(swaps):
            i, j = rng.choice([p for p in permutations(range(len(row)), 2) if {*p} != {*last}])
            row[i], row[j] = row[j], row[i]
            last = i, j
            pairs.append(f'{i + 1} {j + 1}')
        question = f'what color is number {place + 1}?'
        if swaps:
            question = f"swap {', '.join(pairs)}: {question}"
        stories[question] = row[place]['color']
    return list(stories.items())


ASK = {
    'color': ask_color,
    'shape': ask_shape,
    'exist': ask_exist,
    'count': ask_count,
    'compare': ask_compare,
    'relation': ask_relation,
}


def plural(n, word):
    return f'{n} {word}' if n == 1 else f'{n} {word}s'


def questions_of(config, split):
    """{type: (function that lists the questions of a scene, how many of them are asked)} for the types that a
    split asks for."""
    wanted = config.types.split(',')

    def times(type):
        return config.asked * wanted.count(type) if split == 'train' else 1

    ask = {type: (questions, times(type)) for type, questions in ASK.items() if type in wanted}
    if 'hops' in wanted:
        for hops in range(1, config.max_hops + 1):
            # fewer scenes have long chains, so those that do are asked for twice as many
            n = times('hops') if hops == 1 else 2 * times('hops')
            ask[plural(hops, 'hop')] = partial(ask_hops, hops=hops), n
    if 'swaps' in wanted:
        most = config.max_swaps if split == 'test' else config.train_swaps
        for swaps in range(most + 1):  # two stories of a length, as there are no other questions
            ask[plural(swaps, 'swap')] = partial(ask_swaps, swaps=swaps), 2 * times('swaps')
    return ask


def shapes_rows(config, split, start, n_pictures, draw=draw_picture):
    """The rows of so many pictures of a split, from number `start` on: the questions that the scenes allow,
    and the caption of some."""
    ask = questions_of(config, split)
    given = {type: Counter() for type in ask}  # how often each answer was given
    drawn = []
    for i in range(start, start + n_pictures):
        rng = random.Random(f'{config.seed}/{split}/{i}')
        scene, file = draw(rng, config, split)
        picture = dict(image=file, caption=describe(scene))
        for type, (questions, n) in ask.items():
            for k, both in enumerate(balanced_choices(questions(scene), n, given[type], rng)):
                drawn.append(row_of(picture, type, f'{split}-{i}-{type}-{k}', *both))
        if rng.random() < config.describe:
            drawn.append(row_of(picture, 'describe', f'{split}-{i}-describe'))
    return drawn


def row_of(picture, type, sample_id, question=None, answer=None):
    """A row of a dataset; without a question it asks for the caption. picture: its image and caption."""
    sample_id = sample_id.replace(' ', '')
    return picture | dict(question=question, answer=answer, type=type, sample_id=sample_id)


def balanced_choices(candidates, n, given, rng):
    """Yields n different ones, or all, each a `balanced_choice` when it is asked for."""
    left = list(candidates)
    for _ in range(min(n, len(left))):
        both = balanced_choice(left, given, rng)
        left.remove(both)
        yield both


def balanced_choice(candidates, given, rng, key=itemgetter(1)):
    """One of those (question, answer) whose key, the answer, was given least so far, so that a blind guess
    gains little. given: {key: how often}"""
    least = min(given[key(both)] for both in candidates)
    chosen = rng.choice([both for both in candidates if given[key(both)] == least])
    given[key(chosen)] += 1
    return chosen


# ----------------------------------------------------------------------------
# the dataset


def rows(config, shard=2000):
    """Yields (split, row) for train, val and test. No scene is in two splits: a scene is drawn from its
    split's name and its number, with places to fractions of a pixel."""
    sizes = dict(train=config.n_train, val=config.n_val, test=config.n_test)
    yield from on_all_cores(partial(shapes_rows, config), sizes, shard)


def on_all_cores(draw, sizes, shard):
    """Yields (split, row), drawn shard by shard in several processes. draw: a function (split, number of the
    first picture, how many) -> rows; sizes: {split: its pictures}."""
    spawn = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(mp_context=spawn, initializer=end_with_parent)
    try:
        drawn = {}  # all splits at once, so that no core waits between them
        for split, n in sizes.items():
            starts = range(0, n, shard)
            lengths = [min(shard, n - start) for start in starts]
            drawn[split] = pool.map(draw, repeat(split), starts, lengths)
        for split, shards in drawn.items():
            for shard_rows in shards:
                for row in shard_rows:
                    yield split, row
    except BaseException:  # stopped: else the processes would first finish their shards
        for child in multiprocessing.active_children():
            child.terminate()
        raise
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


def contact_sheet(config):
    """Draws pictures with their questions and answers under them, to look at -> a Pillow picture."""
    return sheet_of(shapes_rows(config, 'train', 0, 24), config.image_px)


def sheet_of(rows, side, scale=3):
    """A sheet of the pictures of some rows, all of one size."""
    tiles = {}
    for row in rows:
        picture = squared(rgb_picture(row['image']), side, 'squash', border=None)
        _, lines = tiles.setdefault(row['image'], (picture, []))
        lines.append(f"{row['question']} {row['answer']}" if row['question'] else row['caption'])
    return picture_sheet(list(tiles.values()), columns=6, scale=scale)
