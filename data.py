"""
Pictures, sounds, questions and answers: on disk, as tokens, as batches.

A dataset is a folder with train.parquet, val.parquet and test.parquet, a row a question:

    image      the encoded file as bytes, or {bytes, path} as Hugging Face writes it, or a path in the folder
    sound      a WAV file in the same forms, beside an image or instead of one
    question   a string; null where the row has only a caption
    answer     a string, or a list of reference answers (the first one is trained on)
    caption    optional, a string or a list; without a question a row gets one of PROMPTS, and answers it
    sample_id  optional, any string; names the row in messages and predictions
    type       optional; results are broken down by it; `describe` is the type of captions, judged apart
    group      optional, for imports: pictures of one group (crops of one photograph) land in one split

Any such folder trains: `python train.py config/trm.py --dataset=FOLDER`. This page has, in reading order,
rows, the tokenizer, and batches; prepare/ draws the pictures of `shapes` and reads published datasets.

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
    MEDIA,
    SCHEMA,
    SOUND_SCHEMA,
    KnownPictures,
    OnDisk,
    Pictures,
    View,
    as_list,
    file_problem,
    files_in,
    named,
    open_split,
    report_bad,
    row_problem,
    stream,
    write_dataset,
)
from prepare import ImportConfig, formats, import_dataset
from pretrained.tokenizers import PretrainedTokenizer

# ----------------------------------------------------------------------------
# rows

PROMPTS = ('what is in this image?', 'describe this image.', 'what do you see?', 'describe the picture.')
SOUND_PROMPTS = ('what is in this sound?', 'describe this sound.', 'what do you hear?')


def drawn_prompt(i, prompts=PROMPTS):
    """The question of a row that has only a caption: the same row always gets the same one."""
    return prompts[i % len(prompts)]


def read_rows(folder, split):
    """Reads a split: every row with a question or a caption, each different picture or sound once.

    Shapes: -> Rows, lists as long as the split has rows, but `pictures` and `sounds`, which `picture` and
        `sound` point into.
    Raises: FileNotFoundError; ValueError naming file, row and reason where a row cannot be used.
    """
    path, file = open_split(folder, split)
    n_rows = file.metadata.num_rows
    rows = Rows(path)
    bad = []                 # (row, what is wrong with it)
    known = {key: KnownPictures() for key in MEDIA}  # the number of a picture or sound, by its file's sha256
    start = time.time()
    for i, (place, row) in enumerate(stream(path, SOUND_SCHEMA.names)):
        row_done(f'{path}: rows', i, n_rows, start)
        question = row.get('question')
        references = as_list(row.get('answer'))
        captions = as_list(row.get('caption'))
        type = row.get('type')
        problem = row_problem(question, references, captions)
        # a string here says what is wrong: all bad rows are named together, not the first one alone
        files = files_in(row, folder)
        # a picture with only a caption asks for it, so that captions and answers are learnt alike
        if question is None and captions:
            question = drawn_prompt(i, PROMPTS if 'image' in files else SOUND_PROMPTS)
            references = captions
            type = 'describe'  # whatever its column says: captions are judged apart
        problem = file_problem(files) or problem
        if problem:
            bad.append((i, problem))
            continue
        caption = captions[0] if captions else None
        numbers = dict.fromkeys(MEDIA, -1)  # what the row has not
        for key, file in files.items():
            # a picture with ten questions is decoded and encoded once
            digest = hashlib.sha256(file).digest()
            numbers[key] = known[key].get(digest)
            if numbers[key] is None:
                numbers[key] = rows.media[key].add(digest, *place, i)
                known[key][digest] = numbers[key]
            rows.sum.update(digest if key == 'image' else b'sound' + digest)
        # a run that goes on checks this sum: the same rows in the same order give the same batches
        rows.sum.update('\0'.join((question, *references, caption or '')).encode())
        sample_id = named(row.get('sample_id'), f'row {i}')
        rows.add(*numbers.values(), caption, question, references, named(type, 'all'), sample_id)
    report_bad(path, bad, n_rows, f'repair them, or leave them out: python data.py parquet --source={folder} '
                                  f'--out=FOLDER lists and drops them')
    return rows


class Rows:
    """A split. Its texts are in a temporary file, its pictures in the dataset: it takes little memory.

    rows.question[i], .references[i], .type[i], .sample_id[i]: of row i; .picture[i], .sound[i]: the number of
    its picture and sound, or -1; .pictures[k], .caption[k]: of picture k; .sounds[k], .sound_caption[k]: of
    sound k; .sum: a sha256 of everything, in order.
    """

    def __init__(self, path):
        self.path = path
        self.sum = hashlib.sha256()
        self.media = {key: Pictures(path, key) for key in MEDIA}
        self.pictures = self.media['image']
        self.sounds = self.media['sound']
        self.picture = array('i')
        self.sound = array('i')
        self.texts = OnDisk()         # (question, references, type, sample_id) of a row
        self.captions = OnDisk()
        self.caption_of = {key: array('i') for key in MEDIA}  # the number of a caption, or -1
        self.question = View(self.__len__, partial(self.text, 0))
        self.references = View(self.__len__, partial(self.text, 1))
        self.type = View(self.__len__, partial(self.text, 2))
        self.sample_id = View(self.__len__, partial(self.text, 3))
        self.caption = View(self.pictures.__len__, partial(self.caption_text, 'image'))
        self.sound_caption = View(self.sounds.__len__, partial(self.caption_text, 'sound'))

    def text(self, column, i):
        return self.texts[i][column]

    def caption_text(self, key, number):
        k = self.caption_of[key][number]
        return self.captions[k] if k >= 0 else None

    def sound_of(self, i):
        """The sound file of a row, or None."""
        return self.sounds[self.sound[i]] if self.sound[i] >= 0 else None

    def add(self, picture, sound, caption, *texts):
        numbers = dict(zip(MEDIA, (picture, sound)))
        for key, number in numbers.items():
            # they are numbered as they come: this one is new
            if number == len(self.caption_of[key]):
                self.caption_of[key].append(-1)
        # the first one that a picture or sound has is its caption; that of a row with both is of both
        lacking = [key for key, number in numbers.items() if number >= 0 and self.caption_of[key][number] < 0]
        if caption and lacking:
            for key in lacking:
                self.caption_of[key][numbers[key]] = len(self.captions)
            self.captions.append(caption)
        self.picture.append(picture)
        self.sound.append(sound)
        self.texts.append(texts)

    def __len__(self):
        return len(self.picture)


# ----------------------------------------------------------------------------
# tokenizer

# a word, a number, signs: each with the space before it
WORDS = r'\s?[^\W\d_]+|\s?\d{1,3}|\s?[^\w\s]+|_+|\s+'


class Tokenizer:
    """A byte-level BPE run by tiktoken. <pad>, <bos> and <eos> come after its own tokens; no text encodes to
    them. `state` is of plain types and lives in the checkpoint: {'name': 'gpt2'} or {'name': 'bpe', 'tokens':
    hex strings}.
    """

    def __init__(self, state):
        self.state = state
        if state['name'] == 'gpt2':
            try:
                self.bpe = tiktoken.get_encoding('gpt2')
            except OSError as e:  # requests' errors are OSErrors
                raise ValueError(f'tokenizer=gpt2: its files are not here and cannot be downloaded '
                                 f'({type(e).__name__}); put them in the folder that TIKTOKEN_CACHE_DIR '
                                 f'names, or train one with --tokenizer=bpe') from None
        elif state['name'] == 'bpe':
            ranks = {bytes.fromhex(token): id for id, token in enumerate(state['tokens'])}
            self.bpe = tiktoken.Encoding('bpe', pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
        else:
            raise ValueError(f"tokenizer={state['name']}: expected bpe or gpt2")
        # the first 256 tokens are the bytes, which every text has; those after them were learnt
        merged = [bytes.fromhex(token) for token in state.get('tokens', ())[256:]]
        learnt = ''.join(token.decode(errors='ignore') for token in merged)
        self.tail = 0  # tokens behind a question that belong to it
        self.lower_case = learnt != '' and learnt == learnt.lower()  # the text that it was trained on was
        # marks are numbers that no text encodes to, so a question cannot end an answer
        n = self.bpe.n_vocab
        self.pad_id = n
        self.bos_id = n + 1
        self.eos_id = n + 2
        self.vocab_size = n + 3

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def encode_question(self, text):
        return self.encode(text)

    def piece(self, id):
        """What a token says, as text."""
        return self.bpe.decode([id], errors='replace')

    def decode(self, ids):
        """The text of ids up to <eos>; what is not text is left out."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
        return self.bpe.decode([id for id in ids if id < self.pad_id], errors='replace').strip()


def open_tokenizer(state):
    """The Tokenizer of a state, or what has the names of one, of a pretrained decoder."""
    return PretrainedTokenizer(state) if state['name'] == 'pretrained' else Tokenizer(state)


def train_bpe(texts, vocab_size):
    """Trains a byte-level BPE -> the state of a `Tokenizer`. The same texts give the same tokenizer.

    The pair of tokens that is met most often becomes a token, again and again, until there are `vocab_size`
    tokens or no pair is met twice. Source: Sennrich 2016; bytes as in GPT-2.
    """
    # pairs never cross words, so each different word is counted once and not each time that it is met
    counts = Counter(word for text in texts for word in re.findall(WORDS, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    tokens = {bytes([b]): None for b in range(256)}  # in order
    pairs = Counter()  # how often a pair is met
    where = {}         # the words that hold it
    for i, (word, n) in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += n
            where.setdefault(pair, set()).add(i)

    def backwards(token):
        return *(-b for b in token), 1

    def entry(pair):  # the most frequent first; of equally frequent ones the last in alphabetical order
        return -pairs[pair], backwards(pair[0]), backwards(pair[1]), pair

    # a heap gives the most frequent pair without looking through all of them after each merge; counts in it
    # grow old, and are checked when their pair comes up
    queue = [entry(pair) for pair in pairs]
    heapq.heapify(queue)
    while len(tokens) + 3 < vocab_size and queue:
        count, _, _, best = heapq.heappop(queue)
        if -count != pairs[best]:  # it has become rarer since: back into the queue
            if pairs[best]:
                heapq.heappush(queue, entry(best))
            continue
        if pairs[best] < 2:
            break
        new = best[0] + best[1]
        tokens[new] = None
        fresh = set()
        for i in where.pop(best):  # only the words that hold the pair change
            word, n = words[i]
            # its pairs are taken out before the merge and put back after it, as they are then
            for pair in zip(word, word[1:]):
                pairs[pair] -= n
            merge(word, best)
            for pair in zip(word, word[1:]):
                pairs[pair] += n
                if new in pair:
                    where.setdefault(pair, set()).add(i)
                    fresh.add(pair)
        for pair in fresh:
            heapq.heappush(queue, entry(pair))
    return {'name': 'bpe', 'tokens': [token.hex() for token in tokens]}


def merge(word, pair):
    """Makes one token of every such pair in a word, a list that changes in place."""
    j = 0
    while j < len(word) - 1:
        if (word[j], word[j + 1]) == pair:
            word[j:j + 2] = [word[j] + word[j + 1]]
        j += 1


# ----------------------------------------------------------------------------
# batches

def pack(question_and_answer):
    """Two lists of tokens as bytes: the length of the first, then both."""
    question, answer = question_and_answer
    return np.array([len(question), *question, *answer], np.int32).tobytes()


def unpack(data):
    n, *tokens = np.frombuffer(data, np.int32).tolist()
    return tokens[:n], tokens[n:]


def power_of_two(n):
    """The next one that is not smaller: 5 -> 8."""
    return 1 << (n - 1).bit_length()


def bucket_of(length):
    """Answers of like length go together, those of 5 to 8 tokens, say, in bucket 8."""
    return max(2, power_of_two(length))


class Questions:
    """A split as tokens, and its batches: that of a step depends on (seed, split, step) and nothing else.

    Rows are sorted into buckets by the length of their answer (2, 4, 8, ... tokens), so that a caption does
    not pad a hundred one-word answers, and by what they have, picture or sound. An epoch shuffles every
    bucket, cuts it into batches, smaller ones where answers are longer than 8 tokens, so that all cost about
    the same, and shuffles these.
    Raises: ValueError naming the rows whose question or answer is longer than its limit, unless `truncate`.
    """

    def __init__(self, rows, tokenizer, max_question_tokens=32, max_answer_tokens=32, truncate=False,
                 few_shapes=False):
        self.rows = rows
        self.tokenizer = tokenizer
        self.limits = dict(question=max_question_tokens, answer=max_answer_tokens)
        self.max_answer_tokens = max_answer_tokens
        self.few_shapes = few_shapes
        if max_question_tokens <= tokenizer.tail:
            raise ValueError(f'max_question_tokens={max_question_tokens}: the prompt behind a question has '
                             f'{tokenizer.tail} tokens: expected more')
        self.tokens = OnDisk(pack, unpack)  # (question, answer) of a row
        self.question_lengths = array('i')
        lengths = self.tokenize(truncate)
        self.question_lengths = np.array(self.question_lengths)
        # by table, from length to bucket: one look-up for a million rows
        buckets = np.array([bucket_of(length) for length in range(max(lengths, default=0) + 1)], np.int32)
        # rows of a batch have the same media, so nothing is computed for what a row lacks
        has = 2 * (np.array(rows.picture) < 0) + (np.array(rows.sound) >= 0)
        kind = 4 * buckets[np.array(lengths)] + has
        self.buckets = [(int(k) // 4, np.flatnonzero(kind == k).astype(np.int32)) for k in np.unique(kind)]
        self.drawn = None   # of which (batch_size, seed, epoch) `batches` are
        self.batches = []   # of the epoch that was drawn last

    def tokenize(self, truncate):
        """Makes tokens of all rows. -> the length of every answer"""
        lengths = array('i')
        bad = []
        self.cut = 0
        start = time.time()
        for i, (question, references, *_) in enumerate(self.rows.texts):
            row = dict(question=self.tokenizer.encode_question(question),
                       answer=self.tokenizer.encode(references[0]) + [self.tokenizer.eos_id])
            for key, tokens in row.items():
                most = self.limits[key]
                if len(tokens) > most and truncate:
                    self.cut += 1
                elif len(tokens) > most:
                    bad.append((i, f'the {key} has {len(tokens)} tokens, more than max_{key}_tokens={most}'))
                kept_behind = self.tokenizer.tail if key == 'question' else 0
                del tokens[most - kept_behind:len(tokens) - kept_behind]
            self.tokens.append((row['question'], row['answer']))
            lengths.append(len(row['answer']))
            self.question_lengths.append(len(row['question']))
            row_done(f'{self.rows.path}: tokens', i, len(self.rows), start)
        report_bad(self.rows.path, bad, len(self.rows), 'raise the limit, or cut them with --truncate=true')
        if self.cut:
            print(f'{self.rows.path}: {self.cut} questions or answers cut to their limits')
        return lengths

    def epoch(self, batch_size, seed, epoch):
        """The batches of an epoch, arrays of rows: every row comes once, but for those that fill no batch."""
        # anew from (seed, epoch): a run that goes on draws what it would have drawn, and keeps no state
        rng = np.random.default_rng([seed, epoch])
        batches = []
        for length, bucket in self.buckets:
            size = fitting(batch_size, length)
            order = rng.permutation(bucket)
            # of four batches at a time the rows with like questions go together: half of the padding goes
            for i in range(0, len(order), 4 * size):
                window = order[i:i + 4 * size]
                order[i:i + 4 * size] = window[np.argsort(self.question_lengths[window], kind='stable')]
            # rows that fill no batch wait for the next shuffle; a bucket smaller than a batch is one
            batches += [order[i:i + size] for i in range(0, max(1, len(order) - size + 1), size)]
        # else all captions would come at the end
        return [batches[j] for j in rng.permutation(len(batches))]

    def rows_of_step(self, step, batch_size, seed):
        """The rows of a training batch. Every epoch has as many batches."""
        if self.drawn is None or self.drawn[:2] != (batch_size, seed):
            self.drawn = batch_size, seed, 0
            self.batches = self.epoch(*self.drawn)
        # the batches of one epoch are kept: the next step is nearly always of the same one
        epoch, k = divmod(step, len(self.batches))
        if self.drawn[2] != epoch:
            self.drawn = batch_size, seed, epoch
            self.batches = self.epoch(*self.drawn)
        return self.batches[k]

    def rows_in_order(self, batch_size, most=None):
        """Yields all rows once, for evaluation, bucket by bucket; with `most` so many, always the same."""
        n = len(self.rows)
        kept = np.ones(n, bool)
        # the same rows at every validation, or scores would differ by luck
        if most:
            kept = np.isin(np.arange(n), random.Random(0).sample(range(n), min(most, n)))
        for length, bucket in self.buckets:
            size = fitting(batch_size, length)
            bucket = bucket[kept[bucket]]
            for i in range(0, len(bucket), size):
                yield bucket[i:i + size]

    def batch(self, rows):
        """Some rows as tensors, as short as they can be, or of few different shapes, for compiler and graphs.

        Shapes: -> question (B, Q) padded on the right, answer (B, A) that starts with <bos>, targets (B, A)
            that end with <eos> (but for answers that were cut) and have -100 as padding, picture and sound
            (B,) to index pictures or features with: all rows have one, or all -1. With `few_shapes` Q is a
            multiple of 8 and A a power of 2.
        """
        questions, answers = zip(*(self.tokens[i] for i in rows))
        Q = max(map(len, questions))
        A = max(map(len, answers))
        # every new shape is compiled, or captured as a graph, anew; a few of padding cost less
        if self.few_shapes:
            Q = -(-Q // 8) * 8  # the next multiple of 8
            A = power_of_two(A)
        # what the decoder reads is what it should say, one place later
        inputs = [[self.tokenizer.bos_id] + answer[:-1] for answer in answers]
        # padding of targets is -100, which torch's cross-entropy leaves out
        return dict(question=padded(questions, self.tokenizer.pad_id, Q),                  # (B, Q)
                    answer=padded(inputs, self.tokenizer.pad_id, A),                       # (B, A)
                    targets=padded(answers, -100, A),                                      # (B, A)
                    picture=torch.tensor([self.rows.picture[i] for i in rows]),            # (B,)
                    sound=torch.tensor([self.rows.sound[i] for i in rows]))                # (B,)


def fitting(batch_size, length):
    """How many rows make a batch: fewer where answers have more than 8 tokens, for about equal memory."""
    return max(1, batch_size * 8 // max(8, length))


def padded(lists, value, length=None):
    length = length or max(map(len, lists))
    return torch.tensor([tokens + [value] * (length - len(tokens)) for tokens in lists])


# ----------------------------------------------------------------------------
# the command line: it opens downwards, to prepare/

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith('-'):
        print(__doc__.strip())
        print(f'\nformats: {", ".join(formats())}; python data.py shapes --help lists its settings')
        return
    name = argv[0]
    if name not in formats():
        raise ValueError(f'{name}: no such format; there are {", ".join(formats())}')
    # by name, so that a new format is a new file and nothing else
    module = importlib.import_module(f'prepare.{name}')
    config, _ = configure(getattr(module, 'Config', ImportConfig), argv[1:], f'data.py {name}')
    if getattr(config, 'show', False):
        write_whole(f'{name}.png', partial(module.contact_sheet(config).save, format='PNG'))
        print(f'written: {name}.png')
    elif isinstance(config, ImportConfig):
        import_dataset(module, config)
    else:  # it draws: nothing is read that could be wrong
        write_dataset(config.out, module.rows(config), getattr(module, 'SCHEMA', SCHEMA))


if __name__ == '__main__':
    run_script(main, 'nothing was written, and the same command starts over; pictures fetched are kept')
