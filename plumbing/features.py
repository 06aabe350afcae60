"""From picture files to image tokens: decoded on all cores, encoded once, kept on disk."""

import hashlib
import math
import os
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from plumbing.console import first_three, progress
from plumbing.files import locked
from plumbing.machine import autocast_to, fast_dtypes, on_device, pinned, room_on
from plumbing.ranks import in_turn


def picture_from(file, encoder):
    """A picture or sound file, ready for its encoder, on its device. Shapes: -> (3, S, S), or (bands, frames)
    for Whisper. Raises: FileNotFoundError, ValueError naming the file."""
    try:
        return encoder.preprocess(encoder.open(Path(file).read_bytes()))
    except ValueError as e:
        raise ValueError(f'{file}: {e}') from None


def sound_tokens(data, encoders):
    """What a run hears of a sound file; None where it hears nothing, or there is none. `encoders`: as
    `ContextTokens`. Shapes: -> (1, M, D)"""
    if data is None or 'sound_encoder' not in encoders:
        return None
    encoder = encoders['sound_encoder']
    spectrum = encoder.preprocess(encoder.open(data))[None]                            # (1, 3, S, S)
    return encoder.encode_images(spectrum)                                             # (1, M, D)


def decode(encoder, data, digest):
    """A picture file, or a string that says why there is none -> its pixels, as `Encoder.pixels` gives them.
    Raises: ValueError that says why there are none."""
    if isinstance(data, str):
        raise ValueError(data)
    if hashlib.sha256(data).digest() != digest:
        raise ValueError('it has changed since it was read first')
    return encoder.pixels(encoder.open(data))


AHEAD_BYTES = 2**27  # of picture files that wait to be decoded
DECODING = 2         # how files become pixels; raised when that changes: then they are encoded anew


def decode_ahead(encoder, pictures, files, most, pool):
    """Yields (index, its pixels as a future) of (index, file) pairs in their order, while the next ones are
    read and decoded: at most `most` of them, and AHEAD_BYTES of files and one more."""
    ahead = deque()  # (index, future, bytes of the file)
    n_bytes = 0
    for i, data in files:
        while ahead and (len(ahead) == most or n_bytes > AHEAD_BYTES):
            j, future, size = ahead.popleft()
            yield j, future
            n_bytes -= size
        ahead.append((i, pool.submit(decode, encoder, data, pictures.digests[i]), len(data)))
        n_bytes += len(data)
    for i, future, _ in ahead:
        yield i, future


def decode_all(encoder, pictures, wanted, batch_size, bad):
    """Decodes with all cores, a batch ahead: yields [(index, pixels, or None where there are none), ...] for
    the pictures whose index is in `wanted`, a set or range. `bad`, a list, gets a sentence on each without;
    after the last one `check_none_bad` should see it."""
    if not wanted:
        return
    batch = []
    files = ((i, data) for i, data in enumerate(pictures) if i in wanted)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for i, future in decode_ahead(encoder, pictures, files, batch_size, pool):
            try:
                batch.append((i, future.result()))
            except ValueError as e:  # the next ones go on: one run names all that are bad
                bad.append(f'{pictures.names[i]}: {e}')
                batch.append((i, None))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def check_none_bad(encoder, pictures, bad):
    """Raises: ValueError counting and naming those that cannot be decoded."""
    if bad:
        raise ValueError(f'{len(bad)} of {len(pictures)} {encoder.config.reads}s cannot be used: '
                         f'{first_three(bad)}: remove or repair them')


def pixel_array(encoder, pictures):
    """All pictures decoded, in memory. Shapes: -> (n, 3, S, S) uint8, or (n, bands, frames) float16 for
    Whisper. Raises: ValueError."""
    if not len(pictures):
        return None  # and none is ever asked for
    pixels = []
    bad = []
    for batch in decode_all(encoder, pictures, range(len(pictures)), 256, bad):
        # Whisper's are floats: as halves they take half the memory
        pixels += [p.half() if p is not None and p.is_floating_point() else p for _, p in batch]
    check_none_bad(encoder, pictures, bad)
    return torch.stack(pixels)                                                         # (n, 3, S, S)


class PixelReader:
    """Pictures decoded when they are asked for, on all cores. Shapes: [indices (B,)] -> (B, 3, S, S) uint8"""

    def __init__(self, encoder, pictures):
        self.encoder = encoder
        self.pictures = pictures
        self.pool = ThreadPoolExecutor()

    def __getitem__(self, indices):
        different, places = indices.unique(return_inverse=True)  # in order: no row group is read twice
        files = ((i, self.pictures[i]) for i in different.tolist())
        pixels = []
        for i, future in decode_ahead(self.encoder, self.pictures, files, len(different), self.pool):
            try:
                pixels.append(future.result())
            except ValueError as e:
                raise ValueError(f'{self.pictures.names[i]}: {e}: remove or repair it') from None
        return torch.stack(pixels)[places]                                             # (B, 3, S, S)


# ----------------------------------------------------------------------------
# the cache

class Features:
    """The tokens of pictures, read from the parts of a cache as they are asked for. Shapes: [indices (B,)] ->
    (B, N, D) float16"""

    def __init__(self, files, per_part, n):
        self.files = files
        self.per_part = per_part
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        indices = indices.numpy()
        parts = indices // self.per_part
        tokens = None
        for p in np.unique(parts):
            # mapped anew every time: what stays mapped counts as this process's memory
            part = np.load(self.files[p], mmap_mode='r')                               # (n, N, D)
            if tokens is None:
                tokens = np.empty((len(indices), *part.shape[1:]), np.float16)         # (B, N, D)
            inside = parts == p                                                        # (B,)
            tokens[inside] = part[indices[inside] % self.per_part]
        return torch.from_numpy(tokens)

    def on(self, device):
        """All of them on the device, or None where they would take more than an eighth of its free memory,
        and for a CPU, which reads them from where they are. Shapes: -> (n, N, D) float16"""
        parts = [np.load(file, mmap_mode='r') for file in self.files]                  # (a part's n, N, D)
        if not parts or 8 * sum(part.nbytes for part in parts) > room_on(device):
            return None
        tokens = torch.empty(self.n, *parts[0].shape[1:], dtype=torch.float16, device=device)
        for into, part in zip(tokens.split(self.per_part), parts):
            into.copy_(torch.from_numpy(np.array(part)))  # one after the other: never two of all
        return tokens


def cached_features(encoder, pictures, cache_dir, device='cpu', dim=None, part_bytes=2 ** 28):
    """The tokens of all pictures, encoded once and kept in `cache_dir`, in parts of `part_bytes`.

    A part is named after what it is made from: encoder, dim, dtype and the content of its pictures. So it is
    never stale, every run shares it, and a run that is killed goes on after the last whole part.

    Shapes: dim, how many dimensions of a token to keep, None: all -> (n, N, dim) float16
    Raises: ValueError naming the pictures that cannot be decoded, and where the disk is too small.
    """
    dim = dim or encoder.config.vision_dim
    dtype = fast_dtypes(device)[-1]  # of the matrix products
    with torch.no_grad():
        shape = encoder(torch.zeros(1, *encoder.config.input_shape, device=device)).shape[1:-1] + (dim,)
    per_part = max(1, part_bytes // (2 * math.prod(shape)))
    maker = f'{encoder.fingerprint()} {dim} {dtype} {DECODING}'.encode()
    parts = []
    for start in range(0, len(pictures), per_part):
        digests = pictures.digests[start:start + per_part]
        name = hashlib.sha256(maker + b''.join(digests)).hexdigest()[:32]
        parts.append(Part(Path(cache_dir) / f'{name}.npy', (len(digests), *shape)))
    if not all(part.is_whole() for part in parts):
        with locked(Path(cache_dir) / '.lock', wait=True):
            # asked again: what another process wrote meanwhile is whole now
            missing = {p: part for p, part in enumerate(parts) if not part.is_whole()}
            if missing:
                encode_parts(encoder, pictures, missing, per_part, cache_dir, device, dim, dtype)
    return Features([part.file for part in parts], per_part, len(pictures))


def encode_parts(encoder, pictures, parts, per_part, cache_dir, device, dim, dtype):
    """Encodes the pictures of some parts of a cache, {number of the part: Part}, and writes them. Raises: as
    `cached_features`."""
    for leftover in Path(cache_dir).glob('.*.npy.partial'):  # of a process that was killed
        leftover.unlink()
    n = sum(len(part) for part in parts.values())
    check_room(f'{n} {encoder.config.reads}s', parts.values(), cache_dir)
    done = 0
    start = time.time()
    bad = []
    try:
        wanted = {i for i in range(len(pictures)) if i // per_part in parts}
        batches = without_holes(decode_all(encoder, pictures, wanted, encoder.at_once, bad), parts, per_part)
        for batch, tokens in one_behind(partial(encode_batch, encoder, device, dim, dtype), batches):
            for (i, _), of_picture in zip(batch, checked(tokens)):
                if not parts[i // per_part].dropped:  # by a later picture, which is bad
                    parts[i // per_part].write(of_picture)
            done += len(batch)
            progress(f'encoding {encoder.config.reads}s', done, n, start)
        check_none_bad(encoder, pictures, bad)
    finally:
        for part in parts.values():
            part.drop()
    print(f'| took {time.time() - start:.0f} s')


def without_holes(batches, parts, per_part):
    """The batches of `decode_all` without pictures of a part that has a hole: it is never whole."""
    for batch in batches:
        for i, pixels in batch:
            if pixels is None:
                parts[i // per_part].drop()
        batch = [(i, pixels) for i, pixels in batch if not parts[i // per_part].dropped]
        if batch:
            yield batch


def one_behind(encode, batches):
    """Yields (batch, encode(batch), on the host). While a GPU encodes a batch, the caller has the one before,
    and then the next one is read."""
    last = None
    for batch in batches:
        before = last and (last[0], last[1].cpu())  # first, or it would wait for this batch too
        last = batch, encode(batch)
        if before:
            yield before
    if last:
        yield last[0], last[1].cpu()


def check_room(what, parts, cache_dir):
    """Says how much room some parts of a cache need. Raises: ValueError where that is not free."""
    need = sum(2 * math.prod(part.shape) for part in parts)  # two bytes a number
    free = shutil.disk_usage(cache_dir).free
    print(f'encoding {what} into {cache_dir}: {need / 1e9:.2f} GB, {free / 1e9:.0f} GB are free')
    if need > free:
        raise ValueError(f'cache_dir={cache_dir}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are '
                         'free: choose another --cache_dir, a smaller --vision_dim, or --cache=false to '
                         'encode in every step')


def encode_batch(encoder, device, dim, dtype, batch):
    """[(index, pixels), ...] -> tokens, for which nobody has waited. Shapes: uint8 (3, S, S) each -> float16
    (B, N, dim), on the device."""
    images = torch.stack([pixels for _, pixels in batch])                              # (B, 3, S, S)
    images = on_device(pinned(images, device), device)
    with autocast_to(dtype, device):
        tokens = encoder.encode_images(encoder.normalise(images))                      # (B, N, D)
    return tokens[..., :dim].half()


def checked(tokens):
    """Tokens that are finite, for NumPy. Shapes: (B, N, dim) -> the same. Raises: ValueError."""
    if not tokens.isfinite().all():
        raise ValueError('the encoder makes tokens that are no finite numbers in half precision: its weights '
                         'are damaged, or of another kind of network')
    return tokens.numpy()


class Part:
    """A part of a cache, written picture by picture; it is in place when it is whole, or not at all. Shapes:
    of the part (n, N, D)"""

    def __init__(self, file, shape):
        self.file = file
        self.shape = shape
        self.unfinished = file.with_name(f'.{file.name}.partial')
        self.out = None
        self.written = 0
        self.dropped = False

    def __len__(self):
        return self.shape[0]

    def is_whole(self):
        """Whether it is on disk and has its size; one that has not is encoded anew."""
        try:
            if not self.file.is_file():
                return False
            part = np.load(self.file, mmap_mode='r')
        except (ValueError, OSError, EOFError):
            print(f'{self.file}: damaged, it is made again')
            return False
        return part.shape == self.shape and part.dtype == np.float16

    def write(self, tokens):
        """The next picture's. Shapes: (N, D) float16."""
        if self.out is None:
            self.out = open(self.unfinished, 'wb')
            header = dict(descr='<f2', fortran_order=False, shape=self.shape)
            np.lib.format.write_array_header_1_0(self.out, header)
        self.out.write(tokens.tobytes())
        self.written += 1
        if self.written == len(self):
            self.out.flush()
            os.fsync(self.out.fileno())  # on disk before it has its name: a power cut leaves no half part
            self.out.close()
            os.replace(self.unfinished, self.file)

    def drop(self):
        """Gives up what is not whole."""
        self.dropped = True
        if self.out is not None:
            self.out.close()
            self.unfinished.unlink(missing_ok=True)


# ----------------------------------------------------------------------------
# the tokens of a batch

class FileTokens:
    """The tokens of pictures or sounds: from the cache where their encoder is frozen, else anew from the
    pixels, with gradient where it is `trained`. `cache=False`: anew in any case. `dim`: as `cached_features`

    In two parts, so that a batch can be fetched while the device computes the one before: `fetch`, on the
    CPU, and `encode`, on the device, which nothing in it waits for.
    """

    def __init__(self, encoder, pictures, device, cache_dir, cache=True, trained=False, dim=None):
        self.device = device
        self.dim = dim
        self.trained = trained
        self.features = None
        self.resident = None  # all tokens, on a GPU, where they fit
        if not cache:
            self.pixels = PixelReader(encoder, pictures)
        elif trained:  # its tokens change with every step, the pixels do not
            self.pixels = pixel_array(encoder, pictures)
        else:
            self.features = in_turn(partial(cached_features, encoder, pictures, cache_dir, device, dim))
            self.resident = self.features.on(device)

    def __call__(self, encoder, numbers):
        """`encoder`: with the weights of now, or their average; the one given at first only opened the files.
        Shapes: numbers (B,) of the files -> (B, N, dim), or None where they are -1: the rows have none."""
        fetched = self.fetch(numbers.cpu())
        return None if fetched is None else self.encode(encoder, fetched.to(self.device))

    def fetch(self, numbers):
        """What the device needs of some files: tokens, pixels or, where the tokens of all files lie there,
        the numbers themselves; None where the rows have none. Shapes: (B,) -> (B, N, dim) float16, pixels as
        `pixel_array`'s, or (B,)."""
        if numbers[0] < 0:
            return None
        if self.resident is not None:
            return numbers
        if self.features is not None:
            return self.features[numbers]  # as halves: half the bytes to a GPU
        return self.pixels[numbers]

    def encode(self, encoder, fetched):
        """Shapes: what `fetch` gave, on the device -> (B, N, dim)"""
        if self.features is not None:
            tokens = fetched if self.resident is None else self.resident[fetched]
            return tokens.float()                                                      # (B, N, dim)
        images = encoder.normalise(fetched)                                            # (B, 3, S, S)
        if self.trained and torch.is_grad_enabled():
            tokens = encoder(images)                                                   # (B, N, D)
        else:
            tokens = encoder.encode_images(images)                                     # a few at a time
        return tokens[..., :self.dim]


def is_trained(settings, name):
    """Whether a run trains an encoder along: that of sounds where it has no file. `settings`: those of a run,
    a dict; `name`: the setting that names the encoder."""
    return settings['train_encoder'] if name == 'encoder' else settings[name] is None


COLUMNS = dict(encoder='picture', sound_encoder='sound')  # where a batch has the numbers of its files


class ContextTokens:
    """What a run sees and hears of a split. `encoders`: {'encoder': of pictures, 'sound_encoder': of sounds},
    those that it has; `settings`: its settings, a dict."""

    def __init__(self, settings, encoders, rows, device):
        self.encoders = encoders
        self.tokens = {}
        for name, encoder in encoders.items():
            files, dim = (rows.pictures, settings['vision_dim']) if name == 'encoder' else (rows.sounds, None)
            self.tokens[name] = FileTokens(encoder, files, device, settings['cache_dir'], settings['cache'],
                                           is_trained(settings, name), dim)

    def __call__(self, batch):
        """Shapes: a batch -> image tokens (B, N, D) and sound tokens (B, M, D), each None where the rows or
        the run have none."""
        return [self.of(name, batch[column]) for name, column in COLUMNS.items()]

    def of(self, name, numbers):
        """What one of the encoders makes of pictures or sounds; None without it."""
        return self.tokens[name](self.encoders[name], numbers) if name in self.encoders else None

    def fetch(self, batch):
        """A batch with what the device needs of its files in place of their numbers."""
        fetched = dict(batch)
        for name, column in COLUMNS.items():
            has = name in self.encoders
            fetched[column] = self.tokens[name].fetch(batch[column]) if has else None
        return fetched

    def encode(self, fetched):
        """As a call, of a batch that is fetched, and on the device."""
        made = []
        for name, column in COLUMNS.items():
            what = fetched[column]
            made.append(None if what is None else self.tokens[name].encode(self.encoders[name], what))
        return made
