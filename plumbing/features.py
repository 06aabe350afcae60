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


def decode_all(encoder, pictures, wanted, n, batch_size):
    """Decodes with all cores, a batch ahead: yields [(index, pixels, or None where there are none), ...] for
    the n pictures with wanted(index).
    Raises: ValueError at the end, counting and naming those that cannot be decoded."""
    if not n:
        return
    bad, ahead = [], []

    def finished(batch):
        results = [(i, future.result()) for i, future in batch]
        bad.extend(f'{pictures.names[i]}: {pixels}' for i, pixels in results if isinstance(pixels, str))
        return [(i, None if isinstance(pixels, str) else pixels) for i, pixels in results]

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for i, data in enumerate(pictures):
            if wanted(i):
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
    batches = decode_all(encoder, pictures, lambda i: True, len(pictures), 256)
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
        shape = encoder(
            torch.zeros(1, 3, encoder.config.image_px, encoder.config.image_px, device=device)
        ).shape[1:-1] + (dim,)
    per_part, maker = (
        max(1, part_bytes // (2 * math.prod(shape))),
        f'{encoder.fingerprint()} {dim} {dtype}'.encode(),
    )
    starts = range(0, len(pictures), per_part)
    files = [
        Path(cache_dir)
        / f'{hashlib.sha256(maker + b"".join(pictures.digests[i : i + per_part])).hexdigest()[:32]}.npy'
        for i in starts
    ]
    sizes = [min(per_part, len(pictures) - i) for i in starts]
    whole = lambda p: is_whole(files[p], (sizes[p], *shape))
    if not all(map(whole, range(len(files)))):
        with locked(
            Path(cache_dir) / '.lock', wait=True
        ):  # what another process writes meanwhile is found there afterwards
            missing = [p for p in range(len(files)) if not whole(p)]
            if missing:
                encode_parts(
                    encoder,
                    pictures,
                    {p: Part(files[p], (sizes[p], *shape)) for p in missing},
                    per_part,
                    cache_dir,
                    device,
                    dim,
                    dtype,
                )
    return Features(files, per_part, len(pictures))


def encode_parts(encoder, pictures, parts, per_part, cache_dir, device, dim, dtype):
    """Encodes the pictures of some parts of a cache, {number of the part: Part}, and writes them. Raises: as
    `cached_features`."""
    n, done, start = sum(map(len, parts.values())), 0, time.time()
    for leftover in Path(cache_dir).glob(
        '.*.npy.partial'
    ):  # of a process that was killed: nobody else writes here now
        leftover.unlink()
    need, free = sum(2 * math.prod(part.shape) for part in parts.values()), shutil.disk_usage(cache_dir).free
    print(f'encoding {n} pictures into {cache_dir}: {need / 1e9:.2f} GB, {free / 1e9:.0f} GB are free')
    if need > free:
        raise ValueError(
            f'cache_dir={cache_dir}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: choose '
            f'another '
            f'--cache_dir, a smaller --vision_dim, or --cache=false to encode in every step'
        )
    try:
        for batch in decode_all(encoder, pictures, lambda i: i // per_part in parts, n, encoder.at_once):
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


def vision_source(settings, encoder, rows, device):
    """How to look at the pictures of a split: a function (encoder, picture indices (B,)) -> image tokens (B,
    N, D), which come from the cache where the encoder is frozen, else anew from the pixels, with gradient;
    None without vision."""
    if not settings['use_vision']:
        return lambda encoder, picture: None
    if settings['train_encoder'] or not settings['cache']:
        pixels = (
            pixel_array(encoder, rows.pictures) if settings['cache'] else PixelReader(encoder, rows.pictures)
        )
        trained = settings['train_encoder']
        encode = lambda encoder, images: (
            encoder(images) if trained and torch.is_grad_enabled() else encoder.encode_images(images)
        )  # a few at a time
        return lambda encoder, picture: encode(encoder, encoder.normalise(pixels[picture.cpu()].to(device)))[
            ..., : settings['vision_dim']
        ]
    features = in_turn(
        lambda: cached_features(encoder, rows.pictures, settings['cache_dir'], device, settings['vision_dim'])
    )
    return lambda encoder, picture: features[picture.cpu()].to(device).float()  # halves travel
