"""From picture files to image tokens: decoded on all cores, encoded once, kept on disk."""

import hashlib
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from plumbing.console import progress
from plumbing.files import locked
from plumbing.machine import fast_dtypes
from plumbing.pictures import open_picture
from plumbing.ranks import in_turn


def picture_from(file, encoder):
    """A picture file, ready for an encoder. Shapes: -> (3, S, S). Raises: FileNotFoundError, ValueError
    naming the file."""
    try:
        return encoder.preprocess(open_picture(Path(file).read_bytes()))
    except ValueError as e:
        raise ValueError(f'{file}: {e}') from None


def decode(encoder, data, digest):
    """The pixels of a picture file, uint8 (3, S, S), or a string that says why there are none, as `data` may
    be too."""
    if isinstance(data, str):
        return data
    if hashlib.sha256(data).digest() != digest:
        return 'it has changed since it was read first'
    try:
        return encoder.pixels(open_picture(data))
    except ValueError as e:
        return str(e)


def decode_all(encoder, pictures, wanted, batch_size):
    """Decodes with all cores, a batch ahead: yields [(index, pixels, or None where there are none), ...] for
    the pictures whose index is in `wanted`, a set or range.
    Raises: ValueError at the end, counting and naming those that cannot be decoded."""
    if not wanted:
        return
    bad = []
    ahead = []

    def finished(batch):
        results = [(i, future.result()) for i, future in batch]
        bad.extend(f'{pictures.names[i]}: {pixels}' for i, pixels in results if isinstance(pixels, str))
        return [(i, None if isinstance(pixels, str) else pixels) for i, pixels in results]

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for i, data in enumerate(pictures):
            if i in wanted:
                ahead.append((i, pool.submit(decode, encoder, data, pictures.digests[i])))
                if len(ahead) == 2 * batch_size:
                    yield finished(ahead[:batch_size])
                    del ahead[:batch_size]
        for start in range(0, len(ahead), batch_size):
            yield finished(ahead[start : start + batch_size])
    if bad:
        raise ValueError(
            f'{len(bad)} of {len(pictures)} pictures cannot be used: {"; ".join(bad[:3])}'
            f'{"; ..." * (len(bad) > 3)}: remove or repair them'
        )


def pixel_array(encoder, pictures):
    """All pictures decoded, in memory. Shapes: -> (n, 3, S, S) uint8."""
    batches = decode_all(encoder, pictures, range(len(pictures)), 256)
    return torch.stack([pixels for batch in batches for _, pixels in batch])


class PixelReader:
    """Pictures decoded when they are asked for, on all cores. Shapes: [indices (B,)] -> (B, 3, S, S) uint8"""

    def __init__(self, encoder, pictures):
        self.encoder, self.pictures, self.pool = encoder, pictures, ThreadPoolExecutor()

    def __getitem__(self, indices):
        pixels = list(
            self.pool.map(
                partial(decode, self.encoder),
                *zip(*[(self.pictures[i], self.pictures.digests[i]) for i in indices.tolist()]),
            )
        )
        for i, p in zip(indices.tolist(), pixels):
            if isinstance(p, str):
                raise ValueError(f'{self.pictures.names[i]}: {p}: remove or repair it')
        return torch.stack(pixels)


class Features:
    """The tokens of pictures, read from the parts of a cache as they are asked for. Shapes: [indices (B,)] ->
    (B, N, D) float16"""

    def __init__(self, files, per_part, n):
        self.files, self.per_part, self.n = files, per_part, n

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        indices, tokens = indices.numpy(), None
        parts = indices // self.per_part
        for p in np.unique(parts):
            part = np.load(
                self.files[p], mmap_mode='r'
            )  # anew every time: what stays mapped counts as this process's memory
            tokens = np.empty((len(indices), *part.shape[1:]), np.float16) if tokens is None else tokens
            tokens[parts == p] = part[indices[parts == p] % self.per_part]
        return torch.from_numpy(tokens)


def cached_features(encoder, pictures, cache_dir, device='cpu', dim=None, part_bytes=2**28):
    """The tokens of all pictures, encoded once and kept in `cache_dir`, in parts of `part_bytes`. A part is
    named after what it is made from: encoder, dim, dtype and the content of its pictures; so it is never
    stale, every run shares it, and a run that is killed goes on behind the last whole part.

    Shapes: dim, how many dimensions of a token to keep, None: all -> (n, N, dim) float16
    Raises: ValueError naming the pictures that cannot be decoded, and where the disk is too small.
    """
    dim = dim or encoder.config.vision_dim
    dtype = fast_dtypes(device)[-1] if device.startswith('cuda') else torch.float32  # of the matrix products
    with torch.no_grad():
        S = encoder.config.image_px
        shape = encoder(torch.zeros(1, 3, S, S, device=device)).shape[1:-1] + (dim,)  # (N, dim)
    per_part = max(1, part_bytes // (2 * math.prod(shape)))
    maker = f'{encoder.fingerprint()} {dim} {dtype}'.encode()
    starts = range(0, len(pictures), per_part)
    files = []
    for i in starts:
        content = b''.join(pictures.digests[i:i + per_part])
        files.append(Path(cache_dir) / f'{hashlib.sha256(maker + content).hexdigest()[:32]}.npy')
    sizes = [min(per_part, len(pictures) - i) for i in starts]
    shapes = [(size, *shape) for size in sizes]
    if not all(map(is_whole, files, shapes)):
        with locked(Path(cache_dir) / '.lock', wait=True):
            # what another process wrote meanwhile is there now
            parts = {p: Part(file, size) for p, (file, size) in enumerate(zip(files, shapes))
                     if not is_whole(file, size)}
            if parts:
                encode_parts(encoder, pictures, parts, per_part, cache_dir, device, dim, dtype)
    return Features(files, per_part, len(pictures))


def encode_parts(encoder, pictures, parts, per_part, cache_dir, device, dim, dtype):
    """Encodes the pictures of some parts of a cache, {number of the part: Part}, and writes them. Raises: as
    `cached_features`."""
    n = sum(map(len, parts.values()))
    done = 0
    start = time.time()
    for leftover in Path(cache_dir).glob('.*.npy.partial'):  # of a process that was killed
        leftover.unlink()
    need = sum(2 * math.prod(part.shape) for part in parts.values())
    free = shutil.disk_usage(cache_dir).free
    print(f'encoding {n} pictures into {cache_dir}: {need / 1e9:.2f} GB, {free / 1e9:.0f} GB are free')
    if need > free:
        raise ValueError(
            f'cache_dir={cache_dir}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: choose '
            f'another '
            f'--cache_dir, a smaller --vision_dim, or --cache=false to encode in every step'
        )
    try:
        wanted = {i for i in range(len(pictures)) if i // per_part in parts}
        for batch in decode_all(encoder, pictures, wanted, encoder.at_once):
            for i, pixels in batch:
                if pixels is None:
                    parts[i // per_part].drop()
            batch = [(i, pixels) for i, pixels in batch if not parts[i // per_part].dropped]
            if batch:
                with torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32):
                    tokens = (
                        encoder.encode_images(
                            encoder.normalise(torch.stack([pixels for _, pixels in batch]).to(device))
                        )[..., :dim]
                        .half()
                        .cpu()
                        .numpy()
                    )
                for (i, _), t in zip(batch, tokens):
                    parts[i // per_part].write(t)
            done += len(batch)
            progress('encoding pictures', done, n, start)
    finally:
        for part in parts.values():
            part.drop()
    print(f'| took {time.time() - start:.0f} s')


class Part:
    """A part of a cache, written picture by picture; it is in place when it is whole, or not at all. Shapes:
    of the part (n, N, D)"""

    def __init__(self, file, shape):
        self.file, self.shape, self.written, self.out, self.dropped = file, shape, 0, None, False
        self.unfinished = file.with_name(f'.{file.name}.partial')

    def write(self, tokens):
        if self.out is None:
            self.out = open(self.unfinished, 'wb')
            np.lib.format.write_array_header_1_0(
                self.out, dict(descr='<f2', fortran_order=False, shape=self.shape)
            )
        self.out.write(tokens.tobytes())
        self.written += 1
        if self.written == len(self):
            self.out.flush()
            os.fsync(self.out.fileno())
            self.out.close()
            os.replace(self.unfinished, self.file)

    def __len__(self):
        return self.shape[0]

    def drop(self):
        """Gives up what is not whole."""
        self.dropped = True
        if self.out is not None:
            self.out.close()
            self.unfinished.unlink(missing_ok=True)


def is_whole(file, shape):
    """Whether a part of a cache is there and has its size; one that has not is encoded anew."""
    try:
        part = np.load(file, mmap_mode='r') if file.is_file() else None
        return part is not None and part.shape == shape and part.dtype == np.float16
    except (ValueError, OSError, EOFError):
        print(f'{file}: damaged, it is made again')
        return False


class ImageTokens:
    """The image tokens of a split: from the cache where the encoder is frozen, else anew from the pixels,
    with gradient where the encoder is trained. Made by `vision_source`."""

    def __init__(self, settings, encoder, pictures, device):
        self.device = device
        self.dim = settings['vision_dim']
        self.trained = settings['train_encoder']
        self.features = None
        if self.trained or not settings['cache']:
            self.pixels = PixelReader(encoder, pictures)
            if settings['cache']:
                self.pixels = pixel_array(encoder, pictures)
        else:
            make = partial(cached_features, encoder, pictures, settings['cache_dir'], device, self.dim)
            self.features = in_turn(make)

    def __call__(self, encoder, picture):
        """Shapes: picture, indices (B,) -> (B, N, D)."""
        if self.features is not None:
            return self.features[picture.cpu()].to(self.device).float()  # halves travel
        images = encoder.normalise(self.pixels[picture.cpu()].to(self.device))  # (B, 3, S, S)
        if self.trained and torch.is_grad_enabled():
            tokens = encoder(images)  # (B, N, D)
        else:
            tokens = encoder.encode_images(images)  # a few at a time
        return tokens[..., : self.dim]


def blind(encoder, picture):
    """The image tokens of the blind control: none."""
    return None


def vision_source(settings, encoder, rows, device):
    """How to look at the pictures of a split: a function (encoder, picture indices (B,)) -> image tokens
    (B, N, D), or None without vision. `settings`: those of a run, a dict."""
    if not settings['use_vision']:
        return blind
    return ImageTokens(settings, encoder, rows.pictures, device)
