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
import random
import re
import sys
import time
from array import array
from collections import Counter
from functools import partial

import numpy as np
import tiktoken
import torch

from configurator import configure
from plumbing.console import row_done, run_script
from plumbing.files import write_whole
from plumbing.tables import (
    SCHEMA,
    KnownPictures,
    OnDisk,
    Pictures,
    View,
    caption_problem,
    named,
    open_split,
    read_image,
    report_bad,
    stream,
    text_problem,
    write_dataset,
)

# ----------------------------------------------------------------------------
# datasets on disk


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


PROMPTS = ('what is in this image?', 'describe this image.', 'what do you see?', 'describe the picture.')


def drawn_prompt(i):
    """The question of a row that has only a caption: the same row always gets the same one."""
    return PROMPTS[i % len(PROMPTS)]


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


def padded(lists, value, length=None):
    length = length or max(map(len, lists))
    return torch.tensor([tokens + [value] * (length - len(tokens)) for tokens in lists])


# ----------------------------------------------------------------------------
# the command line

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    from prepare import ImportConfig, formats, import_dataset
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
