"""
Mosaics: questions with known answers about photographs of one's own. Four photographs, or nine, make a
picture; questions ask what is where, as those of the drawn shapes do.

    python data.py mosaics --source=FOLDER --out=data/mosaics

FOLDER has a folder of photographs for each class, whose name is what is seen there; or folders train, test
and perhaps val, of which each has such folders. A photograph is in the mosaics of one split only: where
splits are not given they follow a hash of its file. --groups names a text file with lines such as
`animals: cat, dog, horse`, which allows questions about animals.
"""

import hashlib
import io
import math
import random
import re
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from plumbing.console import cut, first_three, progress
from plumbing.pictures import as_seen, open_picture, squared
from plumbing.tables import SPLITS
from prepare import split_of, text_lines
from prepare.shapes import balanced_choice, on_all_cores, row_of, sheet_of

PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
ROWS = {2: ('top', 'bottom'), 3: ('top', 'middle', 'bottom')}
COLUMNS = {2: ('left', 'right'), 3: ('left', 'center', 'right')}
SIDES = {'left of': (0, -1), 'right of': (0, 1), 'above': (-1, 0), 'below': (1, 0)}  # rows, columns
SAME_IN_PLURAL = ('deer', 'sheep', 'fish', 'aircraft', 'moose', 'salmon')
IRREGULAR = dict(person='people', man='men', woman='women', child='children', mouse='mice', goose='geese',
                 wolf='wolves', leaf='leaves', knife='knives', tooth='teeth', foot='feet')


@dataclass
class Config:
    source: str = ''            # folder of the photographs: class folders, or train/ and test/ with such
    out: str = 'data/mosaics'   # folder to write the dataset to
    groups: str | None = None   # text file, lines "animals: cat, dog": questions about groups too
    n_train: int = 16000        # mosaics in train.parquet
    n_val: int = 1000           # mosaics in val.parquet
    n_test: int = 2000          # mosaics in test.parquet
    grid: int = 2               # photographs along a side: 2 or 3
    cell_px: int = 112          # side of a photograph in the mosaic, in pixels
    describe: float = 0.25      # share of the mosaics that ask for a caption too
    max_bad: float = 0.01       # stop where more than this share of the photographs is bad; 0: where any is
    seed: int = 1337            # the same seed and photographs make the same mosaics
    show: bool = False          # draw a contact sheet, mosaics.png, and nothing else

    def __post_init__(self):
        if not self.source:
            raise ValueError('--source is needed: --source=FOLDER, with a folder of photographs a class')
        if self.grid not in ROWS:
            raise ValueError(f'grid={self.grid}: expected 2 or 3')
        sizes = self.n_train, self.n_val, self.n_test
        if min(sizes) < 0 or not any(sizes) or not 8 <= self.cell_px <= 1024:
            raise ValueError(f'n_train={self.n_train}, n_val={self.n_val}, n_test={self.n_test}, '
                             f'cell_px={self.cell_px}: expected 0 or more, some at least, and 8 to 1024 '
                             'pixels')
        for key in ('describe', 'max_bad'):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected a share, 0 to 1')


def rows(config):
    """Yields (split, row). A mosaic is a pure function of (seed, split, its number) and the photographs."""
    photos = photographs(config)
    classes = sorted({name for of_split in photos.values() for name in of_split})
    groups = read_groups(config.groups, classes)
    sizes = dict(train=config.n_train, val=config.n_val, test=config.n_test)
    for split, n in sizes.items():
        if n and len(photos[split]) < 3:
            raise ValueError(f'{config.source}: photographs of {len(photos[split])} classes for {split}: '
                             'expected three or more; it has '
                             f'{", ".join(sorted(photos[split])[:8]) or "none"}')
    yield from on_all_cores(partial(mosaic_rows, config, photos, groups), sizes, shard=1000)


def contact_sheet(config):
    """Mosaics with their questions and answers, to look at -> a Pillow picture."""
    few = replace(config, n_train=6, n_val=0, n_test=6)
    return sheet_of([row for _, row in rows(few)], config.grid * config.cell_px, scale=1)


def mosaic_rows(config, photos, groups, split, start, n):
    """The rows of so many mosaics of a split, from number `start` on. photos: {split: {class: its files}},
    groups: {name: its classes}."""
    classes = sorted(photos[split])
    asked = {type: Counter() for type in ASK}  # how often each question got each answer
    made = []
    for i in range(start, start + n):
        rng = random.Random(f'{config.seed}/{split}/{i}')
        cells = draw_cells(rng, classes, config.grid ** 2)
        files = [rng.choice(photos[split][name]) for name in cells]
        picture = dict(image=paste(files, config), caption=describe(cells))
        for type, ask in ASK.items():
            candidates = ask(cells, classes, groups)
            if candidates:
                # by the pair, not the answer alone: then to know the question tells little of the answer
                both = balanced_choice(candidates, asked[type], rng, key=tuple)
                made.append(row_of(picture, type, f'{split}-{i}-{type}', *both))
        if rng.random() < config.describe:
            made.append(row_of(picture, 'describe', f'{split}-{i}-describe'))
    return made


# ----------------------------------------------------------------------------
# the photographs

def photographs(config):
    """-> {split: {class: its files}}. Raises: FileNotFoundError, ValueError."""
    source = Path(config.source)
    if not source.is_dir():
        raise FileNotFoundError(f'{source}: no such folder; --source is a folder of class folders')
    given = {split: source / split for split in SPLITS if (source / split).is_dir()}
    others = [folder for folder in source.glob('[!.]*') if folder.is_dir() and folder.name not in SPLITS]
    if others and not {'train', 'test'} <= given.keys():
        given = {}  # a class of that name
    folders = given or {None: source}
    if given and not {'train', 'test'} <= given.keys():
        raise ValueError(f'{source}: it has {", ".join(given)}: expected train and test, or class folders '
                         'alone')
    if 'train' in folders and 'val' not in folders:
        folders['train or val'] = folders.pop('train')
    photos = {split: {} for split in SPLITS}
    seen = set()  # digests of photographs
    again = 0
    faults = []
    n_files = 0
    # test first: what is in it is in no other split
    for published in sorted(folders, key=lambda split: (split != 'test', split != 'val')):
        files = photo_files(folders[published])
        n_files += len(files)
        for file, digest, fault in looked_at(files, folders[published]):
            if fault:
                faults.append(f'{file}: {fault}')
                continue
            if digest in seen:
                again += 1
                continue
            seen.add(digest)
            folder = file.relative_to(folders[published]).parts[0]
            name = class_name(folder)
            if not name:
                raise ValueError(f'{folders[published] / folder}: a folder is called after its class: '
                                 'expected a name with letters or digits')
            photos[split_of(published, digest)].setdefault(name, []).append(str(file))
    if faults:
        problem = f'{len(faults)} of {n_files} photographs cannot be used: {first_three(faults)}'
        if len(faults) > config.max_bad * n_files:
            raise ValueError(f'{problem}: remove or repair them; --max_bad={config.max_bad} allows a share')
        print(f'{problem}: they are left out')
    if again:
        print(f'{source}: {again} photographs are left out: another file, class or split has the same one')
    print(' | '.join(f'{split} {sum(map(len, of_split.values()))}' for split, of_split in photos.items()),
          'photographs')
    classes = {name for of_split in photos.values() for name in of_split}
    for split, of_split in photos.items():
        if lacking := sorted(classes - of_split.keys()):
            print(f'{split}: no photograph of {cut(", ".join(lacking))}: no answer there names one; more '
                  'photographs of a class come into every split')
    return photos


def looked_at(files, folder):
    """Yields (file, digest, None) for every photograph, or (file, None, why it cannot be used), in order."""
    start = time.time()
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for k, (digest, fault) in enumerate(pool.map(digest_or_fault, files)):
            if k % 1000 == 0 or k == len(files) - 1:
                progress(f'{folder}: reading photographs', k + 1, len(files), start)
            yield files[k], digest, fault
    print()


def digest_or_fault(file):
    try:
        data = file.read_bytes()
        open_picture(data)
    except (OSError, ValueError) as e:
        return None, e
    return hashlib.sha256(data).digest(), None


def photo_files(folder):
    """The photographs below the class folders of a folder, in order; none that is hidden. Says what else lies
    there."""
    files = []
    others = Counter()
    for file in sorted(folder.glob('*/**/*')):
        is_hidden = any(part.startswith('.') for part in file.relative_to(folder).parts)
        if not is_hidden and file.is_dir() and file.is_symlink():
            others['linked folder'] += 1  # a class folder may be a link, one in it might lead in a circle
        if is_hidden or not file.is_file():
            continue
        if file.suffix.lower() in PICTURES:
            files.append(file)
        else:
            others[file.suffix.lower() or 'without ending'] += 1
    if others:
        counts = ', '.join(f'{n} {ending}' for ending, n in others.most_common(8))
        print(f'{folder}: {others.total()} other things are left out ({counts}): expected '
              f'{", ".join(PICTURES)}')
    return files


def class_name(folder):
    """What a folder is called in questions: `Golden_Retriever` is a golden retriever."""
    signs = unicodedata.normalize('NFC', folder)
    # some scripts write vowels as marks, which are no letters
    kept = [sign if sign.isalnum() or unicodedata.category(sign).startswith('M') else ' ' for sign in signs]
    return ' '.join(''.join(kept).split()).lower()


def read_groups(path, classes):
    """-> {name of a group, in plural: set of its classes}. Raises: FileNotFoundError, ValueError."""
    groups = {}
    if path is None:
        return groups
    taken = {*classes, *map(plural_of, classes)}
    for i, line in enumerate(text_lines(path)):
        line = line.strip()
        if not line or line.startswith('#'):
            continue
        name, _, members = line.partition(':')
        name = name.strip().lower()
        members = {class_name(member) for member in members.split(',') if member.strip()}
        if not name or not members or members - set(classes):
            raise ValueError(f'{path}: line {i + 1}: {line!r}: expected "name: class, class", of the classes '
                             f'{", ".join(classes[:20])}')
        if name in taken:
            raise ValueError(f'{path}: line {i + 1}: {name} is a class too, or a group before: take another '
                             'name')
        taken.add(name)
        groups[name] = members
    return groups


def draw_cells(rng, classes, n):
    """The classes of n cells: one to n different ones, so that there is something to count."""
    different = rng.sample(classes, min(rng.randint(1, n), len(classes)))
    cells = different + rng.choices(different, k=n - len(different))
    rng.shuffle(cells)
    return cells


def paste(files, config):
    """-> the bytes of a mosaic's file. Raises: ValueError naming a photograph that cannot be used."""
    px = config.cell_px
    mosaic = Image.new('RGB', (config.grid * px, config.grid * px))
    for k, file in enumerate(files):
        try:
            photo = as_seen(open_picture(Path(file).read_bytes()))
        except (OSError, ValueError) as e:
            raise ValueError(f'{file}: {e}: remove or repair it') from None
        row, column = divmod(k, config.grid)
        mosaic.paste(squared(photo, px, 'crop', border=None), (column * px, row * px))
    file = io.BytesIO()
    mosaic.save(file, 'JPEG', quality=92)
    return file.getvalue()


# ----------------------------------------------------------------------------
# words: each function lists the questions that a mosaic allows, with their answers

def ask_what(cells, classes, groups):
    return [(f'what is at the {place(k, cells)}?', name) for k, name in enumerate(cells)]


def ask_exist(cells, classes, groups):
    asked = [(f'is there {a(name)}?', 'yes' if name in cells else 'no') for name in classes]
    for group, members in groups.items():
        asked.append((f'are there any {group}?', 'yes' if members & set(cells) else 'no'))
    return asked


def ask_count(cells, classes, groups):
    counts = counts_of(cells, classes, groups)
    return [(f'how many {words} are there?', str(n)) for words, n in counts.items()]


def ask_compare(cells, classes, groups):
    """Two classes that are both there, or any two groups; as many is a no."""
    there = {words: n for words, n in counts_of(cells, classes, {}).items() if n}
    asked = [(f'are there more {a} than {b}?', 'yes' if m > n else 'no')
             for a, m in there.items() for b, n in there.items() if a != b]
    of_groups = counts_of(cells, [], groups)
    return asked + [(f'are there more {a} than {b}?', 'yes' if m > n else 'no')
                    for a, m in of_groups.items() for b, n in of_groups.items() if a != b]


def ask_relation(cells, classes, groups):
    return [(f'what is {side} the {name}?', cells[neighbour])
            for k, name in only_ones(cells) for side, neighbour in neighbours(k, cells).items()]


def ask_two_steps(cells, classes, groups):
    return [(f'what is {second} the photo {first} the {name}?', cells[end])
            for k, name in only_ones(cells)
            for first, middle in neighbours(k, cells).items()
            for second, end in neighbours(middle, cells).items() if end != k]


ASK = {'what': ask_what, 'exist': ask_exist, 'count': ask_count, 'compare': ask_compare,
       'relation': ask_relation, '2 steps': ask_two_steps}


def counts_of(cells, classes, groups):
    """How many there are of classes and of groups, under the words that a question uses."""
    counts = {plural_of(name): cells.count(name) for name in classes}
    return counts | {group: sum(name in members for name in cells) for group, members in groups.items()}


def only_ones(cells):
    """The cells that can be told by their class: [(number, class)]."""
    return [(k, name) for k, name in enumerate(cells) if cells.count(name) == 1]


def neighbours(k, cells):
    """-> {side: number of the cell there}"""
    grid = math.isqrt(len(cells))
    row, column = divmod(k, grid)
    found = {}
    for side, (down, right) in SIDES.items():
        if 0 <= row + down < grid and 0 <= column + right < grid:
            found[side] = (row + down) * grid + column + right
    return found


def place(k, cells):
    grid = math.isqrt(len(cells))
    row, column = divmod(k, grid)
    words = f'{ROWS[grid][row]} {COLUMNS[grid][column]}'
    return 'center' if words == 'middle center' else words


def describe(cells):
    """The caption that the `describe` questions ask for: every photograph, row by row."""
    parts = [f'{a(name)} at the {place(k, cells)}' for k, name in enumerate(cells)]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def a(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural_of(name):
    """English, mostly: `a box` and `boxes`, `a pony` and `ponies`."""
    first, last = name[:name.rfind(' ') + 1], name[name.rfind(' ') + 1:]
    if last in SAME_IN_PLURAL:
        return name
    if last in IRREGULAR:
        return first + IRREGULAR[last]
    if last.endswith(('s', 'x', 'z', 'ch', 'sh')):
        return name + 'es'
    if re.fullmatch('.*[^aeiou]y', last):
        return name[:-1] + 'ies'
    return name + 's'
