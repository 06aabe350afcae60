"""
Pictures, questions and answers: on disk, as tokens, as batches.

A dataset is a folder with train.parquet, val.parquet and test.parquet, a row a question:

    image      the encoded file as bytes, or {bytes, path} as the Hugging Face writes it, or a path below the folder
    question   a string; null where the row has only a caption
    answer     a string, or a list of reference answers (the first one is trained on)
    caption    optional, a string or a list of several; a row without a question gets one of PROMPTS, with the caption as its answer
    sample_id  optional, any string; names the row in messages and predictions
    type       optional; results are broken down by it

Any such folder trains: `python train.py config/trm.py --dataset=FOLDER`. This page has, in reading order, datasets on disk,
the tokenizer, and batches; the pictures of `shapes` are drawn, and published datasets read, by the modules of prepare/.

    python data.py shapes --show=true                                # draw a contact sheet to look at
    python data.py shapes --out=data/shapes4 --max_hops=4            # draw a dataset with other settings
    python data.py easyvqa --source=easy_vqa/data --out=data/easyvqa # import a published dataset
"""

import hashlib
import heapq
import importlib
import json
import os
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch
from PIL import Image, ImageDraw, ImageFont

from configurator import configure, locked, printable, progress, run_script, write_whole

SPLITS = ('train', 'val', 'test')

# ----------------------------------------------------------------------------
# datasets on disk

SCHEMA = pa.schema([('image', pa.binary()), ('question', pa.string()), ('answer', pa.string()), ('caption', pa.string()),
                    ('sample_id', pa.string()), ('type', pa.string())])


def write_dataset(out, rows, schema=SCHEMA, finish=lambda folder: None):
    """Writes (split, row) pairs to the folder `out`, which appears whole or not at all; `finish` may add files to it.

    Raises: FileExistsError when `out` is there already.
    """
    out = Path(out)
    partial = out.with_name(f'.{out.name}.partial')
    start, n, batch, size, last, files = time.time(), Counter(), {split: [] for split in SPLITS}, Counter(), {}, {}
    # a row group is quickly read; a picture that is asked several times is stored once in it
    options = dict(use_dictionary=True, dictionary_pagesize_limit=2 ** 26)
    with ExitStack() as stack:
        stack.enter_context(locked(out.with_name(f'.{out.name}.lock'), wait=True))
        if out.exists():
            raise FileExistsError(f'{out}: already there; delete it or choose another --out')
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        stack.callback(shutil.rmtree, partial, ignore_errors=True)  # it is in place by then, or of no use
        for split in SPLITS:
            files[split] = stack.enter_context(pq.ParquetWriter(partial / f'{split}.parquet', schema, **options))

        def flush(split):
            files[split].write_table(pa.Table.from_pylist(batch[split], schema))
            batch[split], size[split] = [], 0
            print(f'\r{out} | ' + ' | '.join(f'{split} {n[split]}' for split in SPLITS) + f' questions | {time.time() - start:.0f} s', end='', flush=True)

        for split, row in rows:
            n[split] += 1
            batch[split].append(row)
            size[split] += len(row['image']) * (row['image'] != last.get(split))
            last[split] = row['image']
            if len(batch[split]) == 2000 or size[split] > 2 ** 22:
                flush(split)
        for split in SPLITS:
            flush(split)
            files[split].close()
        print()
        finish(partial)
        for path in partial.iterdir():
            with open(path, 'r+b') as f:
                os.fsync(f.fileno())
        os.replace(partial, out)


def picture_sheet(tiles, columns=6, scale=3, colors=None):
    """A sheet of pictures with lines of text under them, drawn with Pillow. tiles: [(picture, [line, ...]), ...]."""
    font, pad, line_px = ImageFont.load_default(13), 8, 17
    width = max(200, scale * max(p.width for p, _ in tiles))
    wrapped = [[part for line in lines for part in wrap(line, font, width)] for _, lines in tiles]
    height = scale * max(p.height for p, _ in tiles) + line_px * max(map(len, wrapped)) + 4
    sheet = Image.new('RGB', (columns * (width + pad) + pad, -(-len(tiles) // columns) * (height + pad) + pad), 'white')
    draw = ImageDraw.Draw(sheet)
    for k, ((picture, _), lines) in enumerate(zip(tiles, wrapped)):
        x, y = pad + k % columns * (width + pad), pad + k // columns * (height + pad)
        picture = picture.convert('RGB')
        sheet.paste(picture.resize((scale * picture.width, scale * picture.height), Image.NEAREST), (x, y))
        for i, line in enumerate(lines):
            draw.text((x, y + scale * picture.height + 2 + line_px * i), line, colors[k] if colors else 'black', font)
    return sheet


def wrap(line, font, width):
    lines = ['']
    for word in printable(line).split(' '):
        if lines[-1] and font.getlength(f'{lines[-1]} {word}') > width:
            lines.append('')
        lines[-1] = f'{lines[-1]} {word}'.strip()
    return lines


def read_rows(folder, split):
    """Reads a split: every row with a question or a caption, each different picture once.

    Shapes: -> Rows, lists as long as the split has rows, but `pictures`, which `picture` points into.
    Raises: FileNotFoundError without the file; ValueError naming file, row and reason where a row cannot be used.
    """
    path, file = open_split(folder, split)
    rows, bad, known, start = Rows(path), [], KnownPictures(), time.time()
    for i, (place, row) in enumerate(stream(path, SCHEMA.names)):
        row_done(f'{path}: rows', i, file.metadata.num_rows, start)
        image, question, answer, caption, sample_id, type = map(row.get, SCHEMA.names)
        if question is None and caption:
            question, answer, type = drawn_prompt(i), caption, 'describe'  # whatever its column says: captions are judged apart
        image = read_image(image, folder)
        references = [answer] if isinstance(answer, str) else answer
        caption = caption[0] if isinstance(caption, list) and caption else caption
        if not isinstance(image, bytes):
            bad.append((i, image))
        elif problem := text_problem(question, references) or caption_problem(caption):
            bad.append((i, problem))
        else:
            digest = hashlib.sha256(image).digest()
            picture = known.get(digest)
            if picture is None:
                picture = known[digest] = len(rows.pictures)
                rows.pictures.add(digest, *place, i)
            rows.sum.update(digest + '\0'.join((question, *references, caption or '')).encode())
            rows.add(picture, caption, question, references, named(type, 'all'), named(sample_id, f'row {i}'))
    report_bad(path, bad, file.metadata.num_rows, f'repair them, or leave them out: python data.py parquet --source={folder} --out=FOLDER lists and drops them')
    return rows


def named(value, otherwise):
    """A row's sample_id or type as text, which may be 0, or `otherwise` where it has none."""
    return otherwise if value in (None, '') else str(value)


def open_split(folder, split):
    """-> the path of a split's file, and the file, opened. Raises: FileNotFoundError; ValueError where it lacks a column."""
    path = Path(folder) / f'{split}.parquet'
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; a dataset is a folder with train.parquet, val.parquet and test.parquet '
                                f'(python data.py --help says how to draw or import one)')
    file = open_parquet(path)
    for needed in (('image',), ('question', 'caption'), ('answer', 'caption')):
        if not set(needed) & set(file.schema_arrow.names):
            raise ValueError(f'{path}: has no column {" or ".join(needed)}; it has {", ".join(file.schema_arrow.names)}')
    return path, file


def check_splits(folder):
    """Raises: FileNotFoundError or ValueError where a split is not there, lacks a column or has no rows; reads none of them."""
    for split in SPLITS:
        path, file = open_split(folder, split)
        if not file.metadata.num_rows:
            raise ValueError(f'{path}: has no rows; training, validation and test need some each: give more pictures, or files named train, val and test, to python data.py')


def text_problem(question, references):
    """What is wrong with the texts of a row, or None."""
    if not isinstance(question, str) or not question.strip():
        return f'the question is {"empty" if isinstance(question, str) else "no text"}'
    if not isinstance(references, list) or not references or not all(isinstance(a, str) and a.strip() for a in references):
        return 'the answer is empty or no text'
    if not is_unicode(question, *references):
        return 'the question or answer is not in UTF-8'


def caption_problem(caption):
    """What is wrong with the caption of a row, which may have none, or None."""
    if caption is not None and not (isinstance(caption, str) and is_unicode(caption)):
        return f'the caption is {"not in UTF-8" if isinstance(caption, str) else "no text"}'


def is_unicode(*texts):
    """Whether texts can be written: half a character (a lone surrogate) comes of a file in another encoding than UTF-8, or of a bad escape."""
    return not any(re.search('[\ud800-\udfff]', text) for text in texts)


def open_parquet(path):
    """Raises: ValueError where the file is no parquet file or a damaged one."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f'{path}: not a parquet file: {str(e).splitlines()[0]}') from None


def stream(path, columns, at_once=100):
    """Yields ((row group, row in it), row as a dict) for every row of a parquet file, reading `at_once` rows at a time. Raises: ValueError."""
    file = open_parquet(path)
    columns = [key for key in columns if key in file.schema_arrow.names]
    for group in range(file.num_row_groups):
        k, batches = 0, file.iter_batches(at_once, [group], columns)
        while True:
            try:
                rows = plain_rows(next(batches))
            except StopIteration:
                break
            except (pa.ArrowException, OSError, ValueError) as e:
                raise ValueError(f'{path}: damaged in row group {group}, behind row {k} of it: {str(e).splitlines()[0]}') from None
            for row in rows:
                yield (group, k), row
                k += 1


def plain_rows(batch):
    """The rows of a record batch as dicts; texts that are not in UTF-8 come with half characters in them, see `is_unicode`."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        loose = lambda column: [text and text.decode(errors='surrogateescape') for text in column.cast(pa.binary()).to_pylist()]
        columns = [loose(column) if pa.types.is_string(column.type) else column.to_pylist() for column in batch.columns]
        return [dict(zip(batch.schema.names, row)) for row in zip(*columns)]


class OnDisk(Sequence):
    """A long list in a temporary file: a million items take 8 MB of memory. `pack` makes bytes of an item, `unpack` the item of its bytes."""

    def __init__(self, pack=lambda item: json.dumps(item).encode(), unpack=json.loads):
        self.pack, self.unpack, self.file, self.ends, self.at_end = pack, unpack, tempfile.TemporaryFile(), array('Q', [0]), True

    def append(self, item):
        if not self.at_end:
            self.file.seek(self.ends[-1])
            self.at_end = True
        self.ends.append(self.ends[-1] + self.file.write(self.pack(item)))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        self.at_end = False
        self.file.seek(self.ends[i])
        return self.unpack(self.file.read(self.ends[i + 1] - self.ends[i]))


class KnownPictures:
    """What is known of every picture met so far, by the sha256 of its file, in a temporary file: a million pictures take no more memory than ten."""

    def __init__(self):
        self.table = sqlite3.connect('', isolation_level=None)
        self.table.execute('CREATE TABLE known (digest BLOB PRIMARY KEY, value) WITHOUT ROWID')
        self.table.execute('BEGIN')

    def get(self, digest):
        found = self.table.execute('SELECT value FROM known WHERE digest = ?', (digest,)).fetchone()
        return found and json.loads(found[0])

    def __setitem__(self, digest, value):
        self.table.execute('INSERT OR REPLACE INTO known VALUES (?, ?)', (digest, json.dumps(value)))


class View(Sequence):
    """A list whose items are made when they are asked for: `get(i)`, for i under `length()`."""

    def __init__(self, length, get):
        self.length, self.get = length, get

    def __len__(self):
        return self.length()

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.get(k) for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.get(i)


class Rows:
    """A split, see `read_rows`. Its texts lie in a temporary file and its pictures in the dataset, so that a long one takes little memory. `sum` is a
    sha256 of all of them, in order."""

    def __init__(self, path):
        self.path, self.sum = path, hashlib.sha256()
        self.pictures, self.picture = Pictures(path), array('i')                       # each picture once; the picture of a row
        self.texts, self.captions, self.captioned = OnDisk(), OnDisk(), array('i')  # the caption of a picture, or -1
        column = lambda k: View(self.__len__, lambda i: self.texts[i][k])
        self.question, self.references, self.type, self.sample_id = map(column, range(4))
        self.caption = View(lambda: len(self.pictures), lambda i: self.captions[self.captioned[i]] if self.captioned[i] >= 0 else None)

    def add(self, picture, caption, *texts):
        if picture == len(self.captioned):
            self.captioned.append(-1)
        if caption and self.captioned[picture] < 0:
            self.captioned[picture] = len(self.captions)
            self.captions.append(caption)
        self.picture.append(picture)
        self.texts.append(texts)

    def __len__(self):
        return len(self.picture)


class Pictures:
    """The different pictures of a parquet file, as bytes, read when they are asked for: all in order (iterate), or one ([i], which reads
    its row group). `digests` holds the sha256 of each, `names` what to call it in messages."""

    def __init__(self, path):
        self.path, self.groups, self.places, self.rows, self.group = path, array('i'), array('i'), array('i'), (None, None)
        self.sums = OnDisk(bytes, bytes)
        self.digests = View(self.__len__, self.sums.__getitem__)
        self.names = View(self.__len__, lambda i: f'{self.path}, row {self.rows[i]}')

    def add(self, digest, group, place, row):
        self.sums.append(digest)
        self.groups.append(group)
        self.places.append(place)
        self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        places = zip(self.groups, self.places)
        place = next(places, None)
        for here, row in stream(self.path, ['image']):
            if here == place:
                yield read_image(row['image'], self.path.parent)
                place = next(places, None)

    def __getitem__(self, i):
        if self.group[0] != self.groups[i]:
            self.group = self.groups[i], open_parquet(self.path).read_row_group(self.groups[i], ['image'])['image']
        return read_image(self.group[1][self.places[i]].as_py(), self.path.parent)


PROMPTS = ('what is in this image?', 'describe this image.', 'what do you see?', 'describe the picture.')


def drawn_prompt(i):
    """The question of a row that has only a caption: the same row always gets the same one."""
    return PROMPTS[i % len(PROMPTS)]


def read_image(image, folder):
    """The bytes of a picture file from what the image column holds, or a string that says what is wrong with it."""
    if isinstance(image, dict):
        image = image.get('bytes') or image.get('path')
    if isinstance(image, str):
        if not is_unicode(image) or '\0' in image:
            return f'the image path {image!r} is none'
        path = (Path(folder) / image).resolve()
        if not path.is_relative_to(Path(folder).resolve()):
            return f'the image path {image!r} leaves the folder'
        image = read_file(path)
    if image and not isinstance(image, (bytes, str)):
        return f'the image is a {type(image).__name__}, expected bytes or a path'
    return image or 'the image is empty'


def read_file(path):
    """The bytes of a file, or a string that says why there are none."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return f'there is no image file: {path}'
    except (OSError, ValueError) as e:  # a folder, no permission, a name that no file can have
        return f'the image file cannot be read: {path} ({type(e).__name__})'


def report_bad(path, bad, n, remedy):
    """Raises: ValueError that counts the bad rows, names the first ones and says what to do; nothing where there are none."""
    if bad:
        first = '; '.join(f'row {i}: {reason}' for i, reason in bad[:3])
        raise ValueError(f'{path}: {len(bad)} of {n} rows cannot be used: {first}{"; ..." * (len(bad) > 3)}: {remedy}')


# ----------------------------------------------------------------------------
# tokenizer

WORDS = r'\s?[^\W\d_]+|\s?\d{1,3}|\s?[^\w\s]+|_+|\s+'  # a word, a number, signs: each with the space before it


class Tokenizer:
    """A byte-level BPE run by tiktoken, with <pad>, <bos> and <eos> behind its own tokens; text never encodes to those.

    `state` is of plain types and lives in the checkpoint: {'name': 'gpt2'} or {'name': 'bpe', 'tokens': hex strings by id}.
    """

    def __init__(self, state):
        self.state = state
        if state['name'] == 'gpt2':
            try:
                self.bpe = tiktoken.get_encoding('gpt2')
            except OSError as e:  # requests' errors are OSErrors
                raise ValueError(f'tokenizer=gpt2: its files are not here and cannot be downloaded ({type(e).__name__}); put them '
                                 f'in the folder that TIKTOKEN_CACHE_DIR names, or train one with --tokenizer=bpe') from None
        else:
            ranks = {bytes.fromhex(token): id for id, token in enumerate(state['tokens'])}
            self.bpe = tiktoken.Encoding('bpe', pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
        learnt = ''.join(bytes.fromhex(token).decode(errors='ignore') for token in state.get('tokens', ())[256:])
        self.lower_case = learnt != '' and learnt == learnt.lower()  # the text that it was trained on was
        n = self.bpe.n_vocab
        self.pad_id, self.bos_id, self.eos_id, self.vocab_size = n, n + 1, n + 2, n + 3

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        """The text of ids up to <eos>; what is not text is left out."""
        ids = list(ids)
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.bpe.decode([i for i in ids if i < self.pad_id], errors='replace').strip()


def train_bpe(texts, vocab_size):
    """Trains a byte-level BPE -> the state of a `Tokenizer`. The pair that is met most often becomes a token, again and
    again, until there are `vocab_size` tokens or no pair is met twice. The same texts give the same tokenizer.

    Source: Sennrich 2016; bytes as in GPT-2.
    """
    counts = Counter(word for text in texts for word in re.findall(WORDS, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    tokens = {bytes([b]): None for b in range(256)}  # in order
    pairs, where = Counter(), {}
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += n
            where.setdefault(pair, set()).add(i)
    last_first = lambda token: (*(-b for b in token), 1)  # of pairs that are equally frequent the last in alphabetical order comes first
    entry = lambda pair: (-pairs[pair], *map(last_first, pair), pair)
    queue = [entry(pair) for pair in pairs]
    heapq.heapify(queue)
    while len(tokens) + 3 < vocab_size and queue:
        count, *_, best = heapq.heappop(queue)
        if -count != pairs[best]:  # it has become rarer since: back into the queue
            if pairs[best]:
                heapq.heappush(queue, entry(best))
            continue
        if pairs[best] < 2:
            break
        new, fresh = best[0] + best[1], set()
        tokens[new] = None
        for i in where.pop(best):  # only the words that hold the pair change
            word, n = words[i]
            for pair in zip(word, word[1:]):
                pairs[pair] -= n
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == best:
                    word[j:j + 2] = [new]
                j += 1
            for pair in zip(word, word[1:]):
                pairs[pair] += n
                if new in pair:
                    where.setdefault(pair, set()).add(i)
                    fresh.add(pair)
        for pair in fresh:
            heapq.heappush(queue, entry(pair))
    return {'name': 'bpe', 'tokens': [token.hex() for token in tokens]}


# ----------------------------------------------------------------------------
# batches

class Questions:
    """A split as tokens, and its batches: the batch of a step depends on (seed, split, step) and nothing else.

    Rows are sorted into buckets by the length of their answer (2, 4, 8, ... tokens), so that a caption does not pad a hundred
    one-word answers. An epoch shuffles every bucket, cuts it into batches, smaller ones where answers are longer than 8 tokens,
    so that all cost about the same, and shuffles these.
    Raises: ValueError naming the rows whose question or answer is longer than its limit, unless `truncate`.
    """

    def __init__(self, rows, tokenizer, max_question_tokens=32, max_answer_tokens=32, truncate=False, few_shapes=False):
        self.rows, self.tokenizer, self.max_answer_tokens, self.few_shapes, self.cut, bad = rows, tokenizer, max_answer_tokens, few_shapes, 0, []
        def unpacked(data):
            n, *tokens = np.frombuffer(data, np.int32).tolist()
            return tokens[:n], tokens[n:]

        self.tokens = OnDisk(lambda both: np.array([len(both[0]), *both[0], *both[1]], np.int32).tobytes(), unpacked)  # (question, answer) of a row
        self.questions, self.answers = (View(self.tokens.__len__, lambda i, k=k: self.tokens[i][k]) for k in (0, 1))
        lengths, start = array('i'), time.time()
        for i, (question, references, *_) in enumerate(rows.texts):
            question, answer = tokenizer.encode(question), tokenizer.encode(references[0]) + [tokenizer.eos_id]
            for key, tokens, most in (('question', question, max_question_tokens), ('answer', answer, max_answer_tokens)):
                if len(tokens) > most:
                    if truncate:
                        self.cut += 1
                    else:
                        bad.append((i, f'the {key} has {len(tokens)} tokens, more than max_{key}_tokens={most}'))
                    del tokens[most:]
            self.tokens.append((question, answer))
            lengths.append(len(answer))
            row_done(f'{rows.path}: tokens', i, len(rows), start)
        report_bad(rows.path, bad, len(rows), 'raise the limit, or cut them with --truncate=true')
        if self.cut:
            print(f'{rows.path}: {self.cut} questions or answers cut to their limits')
        bucket = np.array([max(2, 1 << (n - 1).bit_length()) for n in range(max(lengths, default=0) + 1)], np.int32)[np.array(lengths)]
        self.buckets = {int(length): np.flatnonzero(bucket == length).astype(np.int32) for length in np.unique(bucket)}
        self.plan = None, None, []  # the epoch drawn last: (batch_size, seed), its number, its batches

    def epoch(self, batch_size, seed, epoch):
        """The batches of an epoch, each an array of rows: every row comes once, but for the last ones of a bucket that fill no batch."""
        rng, batches = np.random.default_rng([seed, epoch]), []
        for length, bucket in self.buckets.items():
            size, order = fitting(batch_size, length), rng.permutation(bucket)
            batches += [order[i:i + size] for i in range(0, max(1, len(order) - size + 1), size)]
        return [batches[j] for j in rng.permutation(len(batches))]

    def rows_of_step(self, step, batch_size, seed):
        """The rows of a training batch."""
        if self.plan[0] != (batch_size, seed):
            self.plan = (batch_size, seed), 0, self.epoch(batch_size, seed, 0)
        epoch, k = divmod(step, len(self.plan[2]))  # every epoch has as many batches
        if self.plan[1] != epoch:
            self.plan = (batch_size, seed), epoch, self.epoch(batch_size, seed, epoch)
        return self.plan[2][k]

    def rows_in_order(self, batch_size, most=None):
        """Yields all rows once, for evaluation, bucket by bucket; with `most` only so many, always the same ones."""
        n = len(self.rows)
        kept = np.isin(np.arange(n), random.Random(0).sample(range(n), min(most, n))) if most else np.ones(n, bool)
        for length, bucket in self.buckets.items():
            bucket, size = bucket[kept[bucket]], fitting(batch_size, length)
            yield from (bucket[i:i + size] for i in range(0, len(bucket), size))

    def batch(self, rows):
        """Shapes: -> question (B, Q) padded on the right, answer (B, A) that starts with <bos>, targets (B, A) that end with
        <eos>, but for answers that were cut, and have -100 as padding, picture (B,) to index pictures or features with. With `few_shapes` Q is a multiple of 8 and A a power of 2,
        which suits a compiler; else they are as short as they can be."""
        bos, pad = self.tokenizer.bos_id, self.tokenizer.pad_id
        questions, answers = zip(*(self.tokens[i] for i in rows))
        Q, A = (max(map(len, lists)) for lists in (questions, answers))
        if self.few_shapes:
            Q, A = -(-Q // 8) * 8, 1 << (A - 1).bit_length()
        return dict(question=padded(questions, pad, Q), answer=padded([[bos] + answer[:-1] for answer in answers], pad, A),
                    targets=padded(answers, -100, A), picture=torch.tensor([self.rows.picture[i] for i in rows]))


def fitting(batch_size, length):
    """Rows of a batch whose answers have so many tokens: fewer where these are more than 8, so that all batches take about the same memory."""
    return max(1, batch_size * 8 // max(8, length))


def row_done(what, i, n, start, every=20000):
    """Says how far a loop over rows is, now and then."""
    if (i + 1) % every == 0:
        progress(what, i + 1, n, start)
        print(end='\n' * (i + 1 + every > n))


def padded(lists, value, length=None):
    length = length or max(map(len, lists))
    return torch.tensor([tokens + [value] * (length - len(tokens)) for tokens in lists])


def cloze(phrases, batch_size, rng):
    """Shapes: phrases, batch_size * P lists of tokens -> caption (B, P, L), padded with -100, left_out (B, P, L), every other word or so, no padding."""
    caption = padded(phrases, -100).unflatten(0, (batch_size, -1))
    drawn = torch.rand(caption.shape, generator=torch.Generator().manual_seed(rng.getrandbits(60))) < .5
    return dict(caption=caption, left_out=drawn & (caption >= 0))


class Captions:
    """The captions of a split's pictures for the alignment, `n_phrases` sentences at a time, none longer than `most_tokens`: longer ones
    are cut into several. A batch depends on (seed, step) and nothing else; an epoch shows every picture once, but for those that fill no batch.
    Raises: ValueError where pictures have no caption, naming them.
    """

    def __init__(self, rows, tokenizer, n_phrases=4, most_tokens=64):
        bad = [name for name, caption in zip(rows.pictures.names, rows.caption) if not (caption and caption.strip())]
        if bad:
            raise ValueError(f'{rows.path}: {len(bad)} of {len(rows.caption)} pictures have no caption, which captions=dataset needs: {", ".join(bad[:3])}')
        self.n_phrases, self.names, self.phrases = n_phrases, rows.pictures.names, []
        for caption in rows.caption:
            tokens = [tokenizer.encode(sentence) for sentence in re.split(r'(?<=[.!?])\s+', caption.strip())]
            self.phrases.append([np.array(t[i:i + most_tokens], np.int32) for t in tokens for i in range(0, len(t), most_tokens)])

    def batch(self, step, batch_size, seed):
        """Shapes: -> picture (B,) to index pictures or features with; caption (B, P, L) and left_out (B, P, L), see `cloze`.
        Raises: ValueError where there are fewer pictures than a batch has."""
        if batch_size > len(self.phrases):
            raise ValueError(f'batch_size={batch_size}: more than the {len(self.phrases)} pictures of the split')
        epoch, k = divmod(step, len(self.phrases) // batch_size)
        picture = np.random.default_rng([seed, epoch]).permutation(len(self.phrases))[k * batch_size:(k + 1) * batch_size]
        rng, phrases = random.Random(f'captions/{seed}/{step}'), []
        for i in picture:
            chosen = rng.sample(self.phrases[i], min(self.n_phrases, len(self.phrases[i])))
            phrases += [list(map(int, p)) for p in (chosen * self.n_phrases)[:self.n_phrases]]
        return dict(picture=torch.from_numpy(picture), names=lambda: [self.names[i] for i in picture[:8]], **cloze(phrases, batch_size, rng))


# ----------------------------------------------------------------------------
# the command line

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    from prepare import ImportConfig, import_dataset, formats
    if not argv or argv[0].startswith('-'):
        print(__doc__.strip() + f'\n\nformats: {", ".join(formats())}; python data.py shapes --help lists its settings')
    elif argv[0] in formats():
        module = importlib.import_module(f'prepare.{argv[0]}')
        config, _ = configure(getattr(module, 'Config', ImportConfig), argv[1:], f'data.py {argv[0]}')
        if getattr(config, 'show', False):
            write_whole(f'{argv[0]}.png', partial(module.contact_sheet(config).save, format='PNG'))
            print(f'written: {argv[0]}.png')
        elif isinstance(config, ImportConfig):
            import_dataset(module, config)
        else:  # it draws: nothing is read that could be wrong
            write_dataset(config.out, module.rows(config))
    else:
        raise ValueError(f'{argv[0]}: no such format; there are {", ".join(formats())}')


if __name__ == '__main__':
    run_script(main)
