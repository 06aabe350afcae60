"""
Importing published datasets. A module of this folder reads one family of formats: its rows(config) yields
(split, row), and what is here checks the rows and writes them.

    split   train, val or test: as it was published; 'train or val', or None for any of the three: the content
            of the picture decides, or of the sound where there is none. Published splits come first
    row     image and sound (bytes, or a path), question, answer, caption, sample_id, type, group, as in
            data.py; or sample_id and bad (why the row cannot be used); or sample_id and missing (why there is
            no picture), which is not counted as bad

A module that draws its pictures has a Config of its own in place of ImportConfig; its rows have their split
and are not checked. A new format is a new module: nothing else names them.
"""

import codecs
import csv
import hashlib
import json
import mmap
import os
import re
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from os.path import normpath
from pathlib import Path

import pyarrow as pa

from plumbing.console import cut
from plumbing.files import write_whole
from plumbing.pictures import rgb_picture
from plumbing.sounds import spectrum_picture
from plumbing.tables import (
    MEDIA,
    OTHER_FOLDER,
    SOUND_SCHEMA,
    SPLITS,
    KnownPictures,
    OnDisk,
    as_list,
    read_file,
    row_problem,
    temporary_problem,
    temporary_table,
    write_dataset,
)

CHUNK_BYTES = 2**26  # of different pictures that are read ahead


def formats():
    """The names of the modules, which are the formats that `python data.py FORMAT` takes."""
    return sorted(path.stem for path in Path(__file__).parent.glob('[!_]*.py'))


@dataclass
class ImportConfig:
    source: str = ''              # folder or file of the published dataset
    images: str = ''              # folder of its pictures, where they lie apart
    out: str = ''                 # folder to write the dataset to
    max_bad: float = 0.01         # stop where more than this share of the rows is bad; 0: where any is
    # fetching pictures by URL, which pixmo does
    workers: int = 32             # connections at a time
    timeout_s: float = 20.0       # for a picture, in seconds
    retries: int = 3              # after a lost connection, a time-out, status 429 or 5xx
    backoff_s: float = 1.0        # pause before the first of them, doubled for each
    most_bytes: int = 2**25       # a larger file is refused
    allow_private: bool = False   # fetch from addresses of the own network too
    retry_failed: bool = False    # ask again for what failed in an earlier run

    def __post_init__(self):
        for key in ('source', 'out'):
            if not getattr(self, key):
                raise ValueError(f'--{key} is needed: --source=FOLDER of the published files, '
                                 f'--out=FOLDER to write')
        for key in ('workers', 'timeout_s', 'most_bytes'):
            if getattr(self, key) <= 0:
                raise ValueError(f'{key}={getattr(self, key)}: expected more than 0')
        for key in ('retries', 'backoff_s'):
            if getattr(self, key) < 0:
                raise ValueError(f'{key}={getattr(self, key)}: expected 0 or more')
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f'max_bad={self.max_bad}: expected a share, 0 to 1')


FETCHING = ('workers', 'timeout_s', 'retries', 'backoff_s', 'most_bytes', 'allow_private', 'retry_failed')

# ----------------------------------------------------------------------------
# checking and writing the rows


def import_dataset(module, config):
    """Writes a published dataset as a dataset folder; what cannot be used is listed in its rejects.jsonl,
    with reasons.

    Raises: ValueError where more than `config.max_bad` of the rows are bad; their list is then beside
        `config.out`; FileNotFoundError.
    """
    fetches = hasattr(module, 'fetch')
    for key in () if fetches else FETCHING:
        if getattr(config, key) != getattr(ImportConfig, key):
            raise ValueError(f'--{key}: {module.__name__.split(".")[-1]} fetches no pictures, so it does not '
                             f'read this; leave it out')
    if config.images and not fetches and not Path(config.images).is_dir():
        raise FileNotFoundError(f'--images={config.images}: no such folder')
    job = Import(module, config)
    texts_type = pa.list_(pa.string())  # a row may have several answers and captions
    schema = SOUND_SCHEMA.set(2, pa.field('answer', texts_type)).set(3, pa.field('caption', texts_type))
    write_dataset(config.out, job.good_rows(), schema, job.finish)


class Import:
    """One import, and what it has met so far."""

    def __init__(self, module, config):
        self.module = module
        self.config = config
        self.known = KnownPictures()  # of a picture: (why it cannot be decoded or None, its split or None)
        self.counts = Counter()       # rows that were read, are missing, bad, shared, divided; pictures
        self.groups = set()           # some of the groups met
        self.written = Counter()      # rows by split
        self.rejects = OnDisk()
        self.reasons = Counter()      # how often each kind of reason was met
        self.first_bad = []           # up to three, of different kinds, for the message
        self.first_shared = None      # a row whose picture another split has

    def good_rows(self):
        """Yields (split, row) for every row that can be used; reads and decodes pictures on all cores."""
        with ThreadPoolExecutor() as pool:
            for chunk in chunks(self.module.rows(self.config)):
                files = {}
                for key in MEDIA:
                    # a picture that several rows name, or hold, is read once and held once
                    named = list(dict.fromkeys(file_of(row, key) for _, row in chunk))
                    files[key] = dict(zip(named, pool.map(partial(read_media, key, self.config), named)))
                    self.decode_new(files[key].values(), pool, key)
                for split, row in chunk:
                    picture, digest, why_none = files['image'][file_of(row, 'image')]
                    sound, digest_of_sound, why_silent = files['sound'][file_of(row, 'sound')]
                    if row.get('sound') is None:  # as in most datasets
                        why_silent = None
                    elif row.get('image') is None:  # the sound stands for it
                        digest, why_none = digest_of_sound, why_silent
                    undecodable, _ = self.known.get(digest_of_sound) or (None, None)
                    problem = row.get('bad') or why_none or why_silent or undecodable or texts_problem(row)
                    beside = digest_of_sound if digest != digest_of_sound else None
                    place = self.place_of(split, row, digest, problem, beside)
                    if place:
                        yield place, row | dict(image=picture, sound=sound, **texts(row))

    def decode_new(self, files, pool, key):
        """Decodes each picture or sound once, however many questions it has."""
        new = {}
        for file, digest, why_none in files:
            if not why_none and self.known.get(digest) is None:
                new[digest] = file
        for digest, problem in zip(new, pool.map(partial(decoding_problem, key), new.values())):
            self.known[digest] = problem, None

    def place_of(self, split, row, digest, problem, sound=None):
        """The split that a row is written to, or None where it is rejected. sound: the digest of its sound,
        where it has a picture too."""
        self.counts['rows'] += 1
        undecodable, earlier = self.known.get(digest) or (None, None)
        if row.get('missing'):
            return self.reject(row, 'missing', row['missing'])
        if problem or undecodable:
            return self.reject(row, 'bad', problem or undecodable)
        # where a published split has a picture of a group, its other pictures go there too
        group = group_digest(row)
        _, of_group = self.known.get(group) or (None, None)
        _, of_sound = self.known.get(sound) or (None, None)
        place = split_of(split, group or digest, earlier or of_sound or of_group)
        if place is None:
            shared = 'picture' if earlier else 'sound' if of_sound else 'group'
            return self.reject(row, 'bad', f'its {shared} is in the test split too')
        for what, where in (('picture', earlier), ('sound', of_sound), ('group', of_group)):
            if where not in (None, place):
                self.counts['shared'] += 1
                example = f'{cut(row.get("sample_id"))} of {place} is in {where}'
                self.first_shared = self.first_shared or (what, example)
                break
        if earlier is None:
            self.known[digest] = None, place
            self.counts['pictures'] += 1
        if sound and of_sound is None:
            self.known[sound] = None, place
        if group and of_group is None:  # where its first picture went, its others go
            self.known[group] = None, place
        if group and len(self.groups) < 100:
            self.groups.add(group)
        self.counts['divided'] += split not in SPLITS
        self.written[place] += 1
        return place

    def reject(self, row, kind, reason):
        self.counts[kind] += 1
        kind_of_reason = re.sub(r"""(?s) '.*'| ".*"|(: | \().*""", '', reason)  # without the details
        self.reasons[kind_of_reason] += 1
        self.rejects.append(dict(sample_id=row.get('sample_id'), reason=reason, missing=kind == 'missing'))
        is_new = self.reasons[kind_of_reason] == 1  # what is wrong with every row is told once
        if kind == 'bad' and is_new and len(self.first_bad) < 3:
            self.first_bad.append(f'{cut(row.get("sample_id"))}: {reason}')

    def finish(self, folder):
        """Adds rejects.jsonl to the folder and says what became of the rows. Raises: ValueError."""
        n_rows = self.counts['rows']
        n_bad = self.counts['bad']
        allowed = n_bad <= self.config.max_bad * n_rows
        out = Path(self.config.out)
        path = folder / 'rejects.jsonl'
        if not allowed:  # the folder will not be there
            path = out.with_name(f'{out.name}.rejects.jsonl')
        write_whole(path, self.write_rejects)
        print(f"{n_rows} rows read, {n_rows - len(self.rejects)} written, {self.counts['missing']} without a "
              f"picture, {n_bad} bad", end='')
        print(''.join(f' | {count} {reason}' for reason, count in self.reasons.most_common(9)))
        if self.first_shared:
            shared, example = self.first_shared
            print(f"{self.counts['shared']} rows have a {shared} that another split has too; splits are kept "
                  f"as they were published: {example}, for example")
        lacking = [split for split in SPLITS if not self.written[split]]
        if lacking:
            print(f'no rows for {" and ".join(lacking)}, and training needs some in each split: '
                  f'{self.why_lacking(lacking)}')
        if not allowed:
            raise ValueError(f'{self.config.source}: {n_bad} of {n_rows} rows cannot be used, more than '
                             f'--max_bad={self.config.max_bad} allows: {"; ".join(self.first_bad)}; all of '
                             f'them are in {path}')

    def why_lacking(self, lacking):
        """Why some splits have no rows, and what to do."""
        n_pictures = self.counts['pictures']
        if not self.counts['rows']:
            return f'{self.config.source} holds no rows; give a source that does'
        if not n_pictures:
            return 'no row could be used, for the reasons above; mend them'
        if self.counts['divided'] and self.groups:
            return (f'a group of pictures stays in one split, and the column group has only '
                    f'{len(self.groups)} different values in {n_pictures} pictures; give more groups (50, '
                    f'say), leave out the column, or name files train, val and test')
        if self.counts['divided']:
            return (f'a tenth of the pictures goes to val and to test each, by a hash of the picture, and '
                    f'there are too few for that, {n_pictures}; give more (50, say), or name files train, '
                    f'val and test')
        there = [split for split in SPLITS if self.written[split]]
        return (f'all files are named after {" and ".join(there)}; add files named after '
                f'{" and ".join(lacking)}, or take the split out of the names: then rows are divided')

    def write_rejects(self, file):
        for entry in self.rejects:
            file.write(json.dumps(entry).encode() + b'\n')


def chunks(rows):
    """Yields lists of (split, row): so many that all cores have work, but at most CHUNK_BYTES of different
    pictures, and one more. Rows that hold equal pictures hold the same one."""
    chunk = []
    held = {}
    n_bytes = 0
    for split, row in rows:
        for key in MEDIA:
            file = file_of(row, key)
            if file not in held:
                held[file] = file
                n_bytes += size_of(file)
            if file is not None:
                row = row | {key: held[file]}
        chunk.append((split, row))
        if len(chunk) == 256 or n_bytes > CHUNK_BYTES:
            yield chunk
            chunk = []
            held = {}
            n_bytes = 0
    if chunk:
        yield chunk


def file_of(row, key):
    """The picture or sound of a row, bytes or a path, or None where there is none, or nothing to do with it.
    key: image or sound"""
    file = row.get(key)
    is_usable = isinstance(file, (bytes, str, Path)) and not row.get('missing') and not row.get('bad')
    return file if is_usable else None


def size_of(file):
    """The bytes of a picture or sound that is in memory, or will be."""
    if file is None or isinstance(file, bytes):
        return len(file or b'')
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):  # it is not there: reading it says so
        return 0


def read_media(key, config, file):
    """-> a picture or sound file as bytes, their sha256, and why there is none, or None. key: image or sound;
    file: bytes, a path or None"""
    if isinstance(file, (str, Path)):
        file = read_inside(file, [config.images, config.source], key)
    if isinstance(file, str):  # why there is none
        return None, b'', file
    if not file:
        return None, b'', f'the {key} is empty'
    return file, hashlib.sha256(file).digest(), None


def texts_problem(row):
    """What is wrong with the texts of a row, or None."""
    known = texts(row)
    return row_problem(row.get('question'), known['answer'], known['caption'])


def read_inside(path, folders, key='image'):
    """The bytes of a file in one of the folders (or one of the files), or a string: why there are none. A
    published file cannot name a path that leads elsewhere; a link can."""
    path = Path(normpath(path))
    for folder in folders:
        if folder and path.is_relative_to(normpath(folder)):
            return read_file(path, key)
    return f'the {key} path leaves the folder: {cut(path)}: {OTHER_FOLDER}'


def plain(value):
    """A value as text that can be printed, or None."""
    return None if value is None else str(value).encode(errors='replace').decode()


def texts(row):
    """Texts of a row as they are written: its answers, the commonest first, and captions as lists, its name
    and type as what can be printed."""
    answers = as_list(row.get('answer'))
    if len(answers) > 2:
        counts = Counter(map(repr, answers))
        answers = sorted(answers, key=lambda answer: -counts[repr(answer)])
    return dict(
        answer=answers,
        caption=as_list(row.get('caption')),
        sample_id=plain(row.get('sample_id')),
        type=plain(row.get('type')),
    )


def decoding_problem(key, file):
    """Why no encoder takes a picture or sound file, or None."""
    try:
        decode = spectrum_picture if key == 'sound' else rgb_picture
        decode(file)
    except ValueError as e:
        return str(e)


# ----------------------------------------------------------------------------
# splits

# the words of a file's name that tell its split, parts and versions of one included (minival, val2014,
# testdev, trainval), but not trains, contest, testimony, devices, valley or oval. `eval` is for the test, as
# the Hugging Face take it
PART = '(?:mini|micro|nano|sub|my|coco|pre)?'
SPLIT_NAMES = dict(
    train=rf'train-val|{PART}train(?!s\b|e|sp)[a-z]*',
    test=rf'test-dev|{PART}(?:dev-?)?(?:test(?!am|im|os|if)|eval)[a-z]*|held-?out|hold-?out',
    val=rf'{PART}(?:val(?![aehklouv])|dev(?![aio]))[a-z]*|[a-z]*[^aeiour\W]val',
)


def group_digest(row):
    """The sha256 of the name of a row's group of pictures, or None where it has none."""
    group = row.get('group')
    return None if group is None else hashlib.sha256(f'group {plain(group)}'.encode()).digest()


def split_of(split, digest, earlier=None):
    """Where a row goes. A published split is kept. Else the sha256 of the picture, or of its group, decides,
    the same for all its questions, whatever else there is, but that a picture which was in another split
    `earlier` stays there; None where that is a published test split and the row is for training."""
    if split in SPLITS:
        return split
    if earlier == 'test' and split is not None:
        return None
    if earlier:
        return earlier
    if digest[0] < 26:  # a tenth of 256
        return 'val'
    if digest[0] < 52 and split is None:
        return 'test'
    return 'train'


def split_of_name(name):
    """The split that a file's name tells, or None; the last word that tells one, as in turing_test_train."""
    words = '-'.join(re.findall('[A-Z]?[a-z]+|[A-Z]+', name)).lower()
    told = None
    for split, names in SPLIT_NAMES.items():
        for match in re.finditer(rf'(?:^|(?<=-))(?:{names})(?=-|$)', words):
            if told is None or match.end() > told[0]:
                told = match.end(), split
    return told and told[1]


def split_of_path(path, source):
    """The split that a file's name tells, else the names of its folders below `source`, or None."""
    names = path.relative_to(source).parts or [path.name]
    return next(filter(None, map(split_of_name, reversed(names))), None)


def published_first(files, source):
    """[(file, split or None)] in order: the split that a file's name tells, else the names of its folders
    below `source`; files that tell one come first, so that the pictures of the others keep out of theirs.
    Where all tell one, but none test, or none val, what is for training is divided. Says where each goes."""
    splits = {path: split_of_path(path, source) for path in files}
    lacking = [split for split in ('val', 'test') if split not in splits.values()]
    if None in splits.values() and len(set(splits.values())) > 1:
        print(f'{source}: some file names tell a split, others do not; the rows of those others are divided, '
              f'by the content of their pictures; name them after train, val or test to keep them together')
    elif lacking and 'train' in splits.values():
        print(f'{source}: no file is named after {" or ".join(lacking)}: rows for training are divided, by '
              f'the content of their pictures')
        divided = None if 'test' in lacking else 'train or val'
        splits = {path: divided if split == 'train' else split for path, split in splits.items()}
    files = sorted(splits.items(), key=lambda both: (both[1] not in SPLITS, both[0]))
    say_where(files, source)
    return files


def say_where(files, source):
    """Says which split each file goes to: a line a file, or a split where there are many."""
    lines = [(split or 'train, val and test', str(path.relative_to(source))) for path, split in files]
    if len(files) > 10:
        of_split = {}
        for split, name in lines:
            of_split.setdefault(split, []).append(name)
        lines = []
        for split, names in of_split.items():
            some = names[0] if len(names) == 1 else f'{len(names)} files, {names[0]} ... {names[-1]}'
            lines.append((split, some))
    for split, name in lines:
        print(f'{name if name != "." else source}: to {split}')


def files_below(config, suffixes):
    """The file --source, or the files of a folder with such suffixes, in order; none that is hidden (its name
    or that of a folder starts with a dot) or put there by a computer of its own accord, and none that an
    import wrote."""
    source = Path(config.source)
    if source.is_file():
        return [source]
    files = []
    left_out = []
    for path in sorted(source.glob('**/*')):
        parts = path.relative_to(source).parts
        is_being_written = any(part.endswith('.partial') for part in parts)
        if path.suffix.lower() not in suffixes or not path.is_file() or is_being_written:
            continue
        is_hidden = any(part.startswith(('.', '~')) or part == '__MACOSX' for part in parts)
        is_written = path.name.endswith('rejects.jsonl') or len(parts) > 1 and is_dataset(path.parent)
        (left_out if is_hidden or is_written else files).append(path)
    if left_out:
        names = ', '.join(str(path.relative_to(source)) for path in left_out[:3])
        print(f'{source}: {len(left_out)} files are not read, as they are hidden or written by an import: '
              f'{cut(names)}')
    return files


def is_dataset(folder):
    """Whether an import wrote this folder."""
    return (folder / 'rejects.jsonl').is_file()


# ----------------------------------------------------------------------------
# reading published files

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what a file in UTF-16 starts with
csv.field_size_limit(2**26)  # signs; it stops at 131,072 else, and a picture may be written into a table
DEEPEST = 100    # lists and objects in one another, in a JSON file
PIECE = 2**16    # bytes of a JSON file that are read at once

FIRST_HALF = rb'\\u[dD][89abAB]..'
SECOND_HALF = rb'\\u[dD][c-fC-F]..'
HALF_CHARACTER = re.compile(FIRST_HALF + b'(?!' + SECOND_HALF + b')|(?<!' + FIRST_HALF + b')' + SECOND_HALF)


ROLES = dict(user='user', human='user', assistant='assistant', gpt='assistant', model='assistant')


def turns(question, answer, messages=None):
    """Yields (question, answer) for every turn of a talk: of `messages`, else of a question with [USER] and
    [ASSISTANT] tags, whose last turn the answer answers. Messages are texts of user and assistant by turns;
    or {role, content} or {from, value}, where what a system says is left out; or {user, assistant} each.
    Raises: ValueError where a message has none of these forms."""
    if isinstance(messages, dict):  # {user: [...], assistant: [...]}, as older files have it
        messages = [dict(zip(messages, values)) for values in zip(*messages.values())]
    if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages):
        yield from spoken(messages)
        return
    if not messages and isinstance(question, str) and re.search(r'\[(USER|ASSISTANT)\]', question):
        parts = [part.strip() for part in re.split(r'\[(?:USER|ASSISTANT)\]', question)]
        inner = range(1, len(parts) - 1)  # nothing before the first tag or after the last one is no turn
        messages = [part for i, part in enumerate(parts) if part or i in inner] + [answer]
    if not isinstance(messages, list) or not messages:
        yield question, answer
    else:  # a question without an answer gets None, which makes it a bad row
        yield from zip_longest(messages[::2], messages[1::2])


def spoken(messages):
    """Yields (question, answer) of messages that are dicts; one of the two is None where the other has no
    partner. Raises: ValueError."""
    asked = None
    n_turns = 0
    for message in messages:
        if 'user' in message and 'assistant' in message:
            said = [('user', message['user']), ('assistant', message['assistant'])]
        else:
            role = message.get('role') or message.get('from')
            said = [(str(role).lower(), message.get('content') or message.get('value'))]
        for role, content in said:
            if role == 'system':
                continue
            if role not in ROLES:
                raise ValueError(f'a message of a talk is of no known role: {cut(repr(message))}')
            if ROLES[role] == 'assistant':
                yield asked, words_of(content)
                asked = None
            elif asked is not None:
                yield asked, None
                asked = words_of(content)
            else:
                asked = words_of(content)
            n_turns += 1
    if asked is not None or not n_turns:
        yield asked, None


def words_of(content):
    """The text of a message, which may be a list of parts, without the mark of where its picture stands."""
    if isinstance(content, list):
        texts = [part.get('text') if isinstance(part, dict) else part for part in content]
        content = ' '.join(text for text in texts if isinstance(text, str))
    if isinstance(content, str):
        content = re.sub(r'\s*<image>\s*', ' ', content).strip()
    return content


def read_json(path, key=None):
    """Yields the items of the list, or the (key, value) pairs of the object, in a JSON file or in a key of
    it. Only a piece of the file is in memory.

    The file is read twice: one that is torn is refused before its first row. Needs the package ijson.
    Raises: FileNotFoundError; ValueError where the file is not JSON, or not of this form.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; --source is the folder of the published files, see '
                                f'prepare/')
    try:
        import ijson
    except ImportError:
        raise ValueError(f'{path}: to read it, pip install ijson') from None
    options = dict(use_float=True, buf_size=PIECE)
    with open(path, 'rb') as f:
        mark = f.read(3)
        if mark.startswith(UTF16):
            raise ValueError(f'{path}: not JSON in UTF-8: it is in UTF-16; save it as UTF-8')
        start = 3 if mark == codecs.BOM_UTF8 else 0
        f.seek(start)
        try:
            # the fast parser makes a ? of half a character; the slow one keeps it, and its row is bad
            parser = ijson.get_backend('python') if has_half_character(f) else ijson
            form = outer_form(parser.basic_parse(f, **options), key)
            f.seek(start)
            if form == 'start_array':
                yield from parser.items(f, 'item' if key is None else f'{key}.item', **options)
            elif form == 'start_map':
                yield from parser.kvitems(f, key or '', **options)
            else:
                raise ValueError('there is no list or object' + (f' {key!r}' if key else ''))
        except (ijson.JSONError, ValueError) as e:
            reason = e.args[0]
            if isinstance(reason, bytes):  # ijson quotes the file
                reason = reason.decode(errors='replace')
            reason = cut(str(reason).splitlines()[0])
            raise ValueError(f'{path}: not JSON of the published form: {reason}') from None


def has_half_character(f):
    """Whether a JSON file has an escape like \\ud83d without the other half of its pair."""
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return HALF_CHARACTER.search(content) is not None


def outer_form(events, key):
    """The event that opens the value of a JSON file, or of a key of its object, or None; goes through all
    events. Raises: ValueError where lists lie too deep in one another: ijson then takes memory without
    end."""
    form = None
    depth = 0
    is_wanted = key is None  # whether the next event opens the value
    for event, value in events:
        if is_wanted:
            form = event
        is_wanted = event == 'map_key' and depth == 1 and value == key
        if event in ('start_array', 'start_map'):
            depth += 1
        elif event in ('end_array', 'end_map'):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError(f'more than {DEEPEST} lists and objects in one another')
    return form


def read_json_lines(path):
    """Yields the value of every line, or a ValueError that says why there is none. Raises:
    FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; --source is the folder of the published files, see '
                                f'prepare/')
    for i, line in enumerate(text_lines(path)):
        try:
            if line.strip():
                yield json.loads(line.encode())
        except (ValueError, RecursionError) as e:
            yield ValueError(f'not JSON in UTF-8: line {i + 1}: {cut(e)}')


def text_lines(path, newline=None):
    """Yields the lines of a text file in UTF-8, or in UTF-16 where it starts with the mark of that; what is
    in another encoding comes as half characters, so that it costs its line and not the file. Raises:
    ValueError."""
    with open(path, 'rb') as f:
        start = f.read(2**10)
    is_utf16 = start.startswith(UTF16)
    if not is_utf16 and start.count(0) > len(start) / 4:
        raise ValueError(f'{path}: not a text file in UTF-8: it is full of zero bytes; save it as UTF-8')
    encoding = 'utf-16' if is_utf16 else 'utf-8-sig'
    errors = 'surrogatepass' if is_utf16 else 'surrogateescape'
    with open(path, newline=newline, encoding=encoding, errors=errors) as f:
        try:
            yield from f
        except UnicodeDecodeError as e:
            raise ValueError(f'{path}: not text in {encoding}: {e.reason}; save it as UTF-8') from None


def sorted_on_disk(keyed):
    """Yields the values of (key, value) pairs in the order of their keys, each of two numbers or strings, by
    way of a temporary file. Raises: OSError that names its folder."""
    table = temporary_table('a, b, value')
    lines = ((a, b, json.dumps(value)) for (a, b), value in keyed)
    try:
        table.executemany('INSERT INTO rows VALUES (?, ?, ?)', lines)
        for (value,) in table.execute('SELECT value FROM rows ORDER BY a, b, rowid'):
            yield json.loads(value)
    except sqlite3.Error as e:
        raise temporary_problem(e) from None


def number(i, value):
    return i


def published(path, values, make, name=number):
    """Yields the rows that make(value) yields for every value of a file; a value of another form than the
    published one becomes a bad row, called after the file and `name` of its number and itself."""
    for i, value in enumerate(values):
        try:
            if isinstance(value, ValueError):
                raise value
            made = list(make(value))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            reason = f'not of the published form: {type(e).__name__} {cut(e)}'
            made = [(None, dict(bad=reason, sample_id=f'{Path(path).name}-{name(i, value)}'))]
        yield from made
