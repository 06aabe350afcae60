"""
Sounds: pictures as in shapes.py, melodies of a few tones, and questions about the one, the other, or both;
drawn from a seed, nothing is read or downloaded.

In reading order: melodies, their WAV files and captions; questions about a melody, about both; the dataset.
Questions about one of the two come without the other half of the time. The question whether there are `as
many` has a picture and a melody of its own, drawn so that neither of the two tells the answer; a `choice` has
a picture of its own, in which two objects can be told apart by their shapes.
`python data.py sounds --show=true` draws a contact sheet.
"""

import io
import random
import wave
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import numpy as np
from PIL import Image

from plumbing.pictures import picture_sheet, rgb_picture
from plumbing.sounds import spectrum_picture
from plumbing.tables import SOUND_SCHEMA
from prepare import shapes
from prepare._looks import COLORS
from prepare.shapes import (
    SHAPES,
    balanced_choices,
    draw_scene,
    group_counts,
    on_all_cores,
    picture_file,
    questions_of,
    row_of,
    unique,
)

SCHEMA = SOUND_SCHEMA
RATE = 8000                         # samples a second
PITCHES = {'low': (250, 315, 400), 'high': (800, 1000, 1250)}   # hertz
LENGTHS = {'short': 0.15, 'long': 0.4}                          # seconds
INSTRUMENTS = {'flute': (1,), 'organ': (1, 0, 0.7, 0, 0.5), 'buzzer': (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)}
#              how loud each multiple of the pitch is
ORDER = ('first', 'second', 'third', 'fourth')
MOST_TONES = len(ORDER)


@dataclass
class Config(shapes.Config):
    out: str = 'data/sounds'  # folder to write the dataset to
    n_train: int = 5000       # scenes in train.parquet
    n_val: int = 500          # scenes in val.parquet
    n_test: int = 500         # scenes in test.parquet
    types: str = 'color,shape,exist,count,count'  # asked about pictures alone; counting takes longest
    variety: float = 0.0      # share of the training pictures in varied styles
    describe: float = 0.0     # share of the pictures that also ask for their caption
    alone: float = 0.5        # share of the questions about picture or sound that come without the other

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alone <= 1:
            raise ValueError(f'alone={self.alone}: expected a share, 0 to 1')
        if self.describe:
            raise ValueError(f'describe={self.describe}: expected 0, sounds have no captions here')
        if self.types == 'swaps':
            raise ValueError('types=swaps: expected types that any picture has, color or count, say')


# ----------------------------------------------------------------------------
# melodies


def draw_melody(rng, n):
    """n tones, no two of the same pitch: dicts with instrument, pitch, length, hertz, seconds."""
    notes = rng.sample([(pitch, hertz) for pitch, all_hertz in PITCHES.items() for hertz in all_hertz], n)
    melody = []
    for pitch, hertz in notes:
        length = rng.choice(tuple(LENGTHS))
        melody.append(dict(instrument=rng.choice(tuple(INSTRUMENTS)), pitch=pitch, length=length, hertz=hertz,
                           seconds=LENGTHS[length]))
    return melody


def sound_file(melody, rng):
    """-> the bytes of a WAV file of the melody, a little out of tune and time"""
    parts = [silence(rng.uniform(0.02, 0.2))]
    for tone in melody:
        hertz = tone['hertz'] * rng.uniform(0.98, 1.02)
        time = np.arange(round(tone['seconds'] * rng.uniform(0.9, 1.1) * RATE)) / RATE         # (n,)
        wave_form = sum(loud * np.sin(2 * np.pi * k * hertz * time)
                        for k, loud in enumerate(INSTRUMENTS[tone['instrument']], 1) if k * hertz < RATE / 2)
        # it swells and fades in a hundredth of a second: no click
        edge = np.minimum(time, time[::-1]) / 0.01
        parts += [rng.uniform(0.1, 0.3) * wave_form * edge.clip(0, 1), silence(rng.uniform(0.08, 0.14))]
    samples = np.concatenate(parts)
    file = io.BytesIO()
    with wave.open(file, 'wb') as out:
        out.setnchannels(1)
        out.setsampwidth(1)  # eight bits, without a sign
        out.setframerate(RATE)
        out.writeframes((128 + 127 * samples.clip(-1, 1)).round().astype(np.uint8).tobytes())
    return file.getvalue()


def silence(seconds):
    return np.zeros(round(seconds * RATE))


def tone_counts(melody):
    """How many tones of each kind there are, under the words a question uses: {words: count}."""
    counts = {'tones': len(melody)}
    for key, values in dict(length=LENGTHS, pitch=PITCHES, instrument=INSTRUMENTS).items():
        for value in values:
            counts[f'{value} tones'] = sum(tone[key] == value for tone in melody)
    return counts


def extremes(melody):
    """Which tone is the highest and which the lowest, under the words a question uses."""
    hertz = [tone['hertz'] for tone in melody]
    return {'highest': ORDER[hertz.index(max(hertz))], 'lowest': ORDER[hertz.index(min(hertz))]}


def describe_melody(melody, rng, n=6):
    """Phrases to align an encoder with: `n` tones by their places, repeated if there are fewer, the last tone
    under that name too, a third of them with their pitch in hertz; how many tones there are, of any kind and
    of one; which is the highest and the lowest.

    'first tone high long organ', 'last tone 315 hertz', '2 low tones', 'highest tone second'.
    """
    places = [*zip(ORDER, melody), ('last', melody[-1])]
    for k, (when, tone) in enumerate((rng.sample(places, len(places)) * n)[:n]):
        if k % 3:
            yield f"{when} tone {tone['pitch']} {tone['length']} {tone['instrument']}"
        else:
            yield f"{when} tone {tone['hertz']} hertz"
    counts = tone_counts(melody)
    yield f"{counts.pop('tones')} tones"
    words = rng.choice(list(counts))
    yield f'{counts[words]} {words}'
    for word, when in extremes(melody).items():
        yield f'{word} tone {when}'


# ----------------------------------------------------------------------------
# questions: every type lists all the questions that a melody allows, as (question, answer) pairs


def ask_tones(melody):
    return [(f'how many {words} are there?', str(count)) for words, count in tone_counts(melody).items()]


def ask_highest(melody):
    if len(melody) == 1:
        return []
    return [(f'which tone is the {word}?', when) for word, when in extremes(melody).items()]


def ask_plays(melody):
    asked = [(f'what plays the {word} tone?', tone['instrument']) for word, tone in zip(ORDER, melody)]
    return [*asked, ('what plays the last tone?', melody[-1]['instrument'])]


def ask_before(melody):
    """Instruments that play once each."""
    once = unique(melody, 'instrument')
    return [(f"does the {a['instrument']} play before the {b['instrument']}?",
             'yes' if melody.index(a) < melody.index(b) else 'no') for a, b in permutations(once, 2)]


def ask_quality(melody):
    """What a choice depends on, by itself."""
    asked = []
    for when, tone in (*zip(ORDER, melody), ('last', melody[-1])):
        asked.append((f'is the {when} tone high?', 'yes' if tone['pitch'] == 'high' else 'no'))
        asked.append((f'is the {when} tone long?', 'yes' if tone['length'] == 'long' else 'no'))
    return asked


def ask_choice(scene, melody):
    """A tone tells which of two objects is meant: who sees no picture knows no colour, who hears nothing has
    two to choose from."""
    asked = []
    for when, tone in (('first', melody[0]), ('last', melody[-1])):
        for key, value in (('pitch', 'high'), ('length', 'long')):
            for a, b in permutations(unique(scene, 'shape'), 2):
                if a['color'] != b['color']:
                    question = (f"if the {when} tone is {value}, what color is the {a['shape']}, else the "
                                f"{b['shape']}?")
                    asked.append((question, (a if tone[key] == value else b)['color']))
    return asked


ASK = dict(tones=ask_tones, highest=ask_highest, plays=ask_plays, before=ask_before, quality=ask_quality)


def draw_match(rng):
    """A group of objects, how many of them a picture has, and how many tones go with it: the same number or,
    half of the time, another. Each number, of objects or of tones, comes equally often with yes and no:
    picture, melody or question alone say nothing.

    -> (colour, shape) pairs of the objects; the number of tones; question and answer
    """
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    which = rng.randrange(2)  # the group has a colour, or a shape
    value = rng.choice((tuple(COLORS), SHAPES)[which])
    n_objects = rng.randint(1, MOST_TONES)
    chosen = rng.sample([pair for pair in pairs if pair[which] == value], n_objects)
    others = rng.sample([pair for pair in pairs if pair[which] != value], rng.randint(1, 2))
    n_tones = n_objects
    if rng.random() < 0.5:
        n_tones = rng.choice([n for n in range(1, MOST_TONES + 1) if n != n_objects])
    words = list(group_counts([])[('color', 'shape')[which]])[(tuple(COLORS), SHAPES)[which].index(value)]
    question = f'are there as many tones as {words}?'
    return chosen + others, n_tones, question, 'yes' if n_tones == n_objects else 'no'


def draw_choice(rng):
    """Objects that a tone can choose from: two of different colours, whose shapes no other object has, and up
    to two others. -> their (colour, shape) pairs"""
    shapes = rng.sample(SHAPES, len(SHAPES))
    chosen = list(zip(rng.sample(tuple(COLORS), 2), shapes))
    others = [(color, shape) for color in COLORS for shape in shapes[2:]]
    return chosen + rng.sample(others, rng.randint(0, 2))


# ----------------------------------------------------------------------------
# the dataset


def sound_rows(config, split, start, n_scenes):
    """The rows of so many scenes of a split, from number `start` on; a scene has a picture and a melody."""
    of_picture = questions_of(config, split)
    times = config.asked if split == 'train' else 1
    given = {type: Counter() for type in (*of_picture, *ASK, 'choice')}  # how often each answer was given
    drawn = []
    for i in range(start, start + n_scenes):
        rng = random.Random(f'{config.seed}/sounds/{split}/{i}')
        scene, image = shapes.draw_picture(rng, config, split)
        melody = draw_melody(rng, rng.randint(1, MOST_TONES))
        sound = sound_file(melody, rng)
        asked = [('image', type, questions(scene), n) for type, (questions, n) in of_picture.items()]
        asked += [('sound', type, questions(melody), times) for type, questions in ASK.items()]
        for needed, type, candidates, n in asked:
            for k, both in enumerate(balanced_choices(candidates, n, given[type], rng)):
                media = dict(image=image, sound=sound)
                if rng.random() < config.alone:
                    media = {key: file if key == needed else None for key, file in media.items()}
                drawn.append(row_of(media, type, f'{split}-{i}-{type}-{k}', *both))
        drawn += match_rows(config, split, i, times, rng)
        drawn += choice_rows(config, split, i, melody, sound, given['choice'], rng)
    return drawn


def match_rows(config, split, i, times, rng):
    """The rows of type `match`, which have pictures and melodies of their own."""
    drawn = []
    for k in range(times):
        pairs, n_tones, *both = draw_match(rng)
        scene = draw_scene(rng, config, pairs=pairs)
        media = dict(image=picture_file(scene, False, rng, config),
                     sound=sound_file(draw_melody(rng, n_tones), rng))
        drawn.append(row_of(media, 'match', f'{split}-{i}-match-{k}', *both))
    return drawn


def choice_rows(config, split, i, melody, sound, given, rng):
    """The rows of type `choice`, of a picture of their own. There are twice as many as of others in train, of
    one picture and melody: all that tells their answers apart is which tone chooses between which objects."""
    scene = draw_scene(rng, config, pairs=draw_choice(rng))
    media = dict(image=picture_file(scene, False, rng, config), sound=sound)
    times = 2 * config.asked if split == 'train' else 1
    chosen = balanced_choices(ask_choice(scene, melody), times, given, rng)
    return [row_of(media, 'choice', f'{split}-{i}-choice-{k}', *both) for k, both in enumerate(chosen)]


def rows(config, shard=500):
    """Yields (split, row) for train, val and test."""
    sizes = dict(train=config.n_train, val=config.n_val, test=config.n_test)
    yield from on_all_cores(partial(sound_rows, config), sizes, shard)


def contact_sheet(config):
    """Draws pictures beside the spectra of their sounds, with questions and answers -> a Pillow picture."""
    tiles = {}
    for row in sound_rows(config, 'train', 0, 8):
        if row['image'] and row['sound']:
            tile = Image.new('RGB', (2 * config.image_px, config.image_px))
            tile.paste(rgb_picture(row['image']))
            tile.paste(spectrum_picture(row['sound']).resize((config.image_px,) * 2), (config.image_px, 0))
            _, lines = tiles.setdefault((row['image'], row['sound']), (tile, []))
            lines.append(f"{row['question']} {row['answer']}")
    return picture_sheet(list(tiles.values()), columns=4, scale=2)
