"""Files that appear whole or not at all, locks, and torch files that are read without running anything in
them."""

import os
import pickle
import re
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch

from plumbing.ranks import rank_and_world

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# what reading a bad archive raises, beside ValueError
DAMAGED = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, AssertionError, OSError,
           zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)


def write_whole(path, write):
    """Calls write(file) on a temporary file and puts it in place: `path` is the old or the new file, never a
    part of one. Of several processes that work together only the first one writes.

    Raises: OSError naming the path, where the disk is full, say.
    """
    rank, _ = rank_and_world()
    if rank > 0:
        return
    path = Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        with open(partial, 'wb') as f:
            write(f)
            # on the disk before it gets its name: a machine that goes down leaves the old file or the new one
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        # torch.save cannot end its file on a full disk, and hides that error under a RuntimeError of its own
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(file, wait=False):
    """Keeps other processes that ask for the same lock file out, until the block or the process ends, however
    it ends. On Windows, and on a disk that knows no locks, it does not.

    Raises: ValueError where another process is in it, unless `wait`, which waits for that one to finish.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # the system takes the lock back when the file is closed, so a process that is killed leaves none
    with open(file, 'w') as f:
        if fcntl is not None:
            take_lock(f, file, wait)
        yield


def take_lock(f, file, wait):
    """Raises: as `locked`."""
    folder = file.parent
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise ValueError(f'{folder}: another process is writing there; wait for it, or choose another '
                             f'folder') from None
        print(f'{folder}: another process is writing there, waiting for it', flush=True)
        fcntl.flock(f, fcntl.LOCK_EX)
    except OSError as e:
        print(f'{file}: no lock is to be had here ({e.strerror}); see to it that no other process '
              f'writes to {folder}')


def impostor(start):
    """What stands in the place of a file, by its first bytes, and what to do; '' where nothing is known of
    it."""
    start = start[:1000].lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    is_page = start.startswith(b'<') and (b'<html' in start or b'<!doctype html' in start)
    if start.startswith(b'version https://git-lfs.github.com/spec/'):
        return 'it is a pointer of Git LFS, not the file itself: git lfs pull in its repository fetches that'
    if is_page:
        return 'it is a web page, not the file itself: download that again, by its direct link'
    return ''


def refuse_impostor(path):
    """Raises: ValueError where a pointer of Git LFS or a web page lies in the place of a file."""
    if os.path.isfile(path):
        with open(path, 'rb') as f:
            what = impostor(f.read(1000))
        if what:
            raise ValueError(f'{path}: {what}')


class Inert:
    """Stands for an object of a pickle whose content is of no use here, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# what others pickle beside their weights: Edge-Glass' settings; arguments, paths and NumPy's numbers
INERT = (r'config\.\w+Config|argparse\.Namespace|pathlib\.(_local\.)?\w*Path|'
         r'numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+DType)|_codecs\.encode')


def safe_load(path):
    """torch.load of tensors and plain types only: nothing in the file is run. What others pickle beside their
    weights, `INERT`, becomes objects without content. Files up to 1 GB are held against their checksums,
    larger ones are memory-mapped.

    Raises: ValueError for everything else.
    """
    refuse_impostor(path)
    try:
        zipped = zipfile.is_zipfile(path)
        large = os.path.getsize(path) >= 2**30
        if zipped and not large:
            check_sums(path)
        with torch.serialization.safe_globals(stand_ins(path) if zipped else []):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped and large)
    except (ValueError, *DAMAGED) as e:
        reason = beginning_of_text(path) or telling_line(e)[:200]
        raise ValueError(f'{path}: not a file that can be read safely ({reason})') from None


def beginning_of_text(path):
    """Says how a file begins that is text and nothing else, such as the answer of a server; else ''."""
    if not os.path.isfile(path):
        return ''
    with open(path, 'rb') as f:
        start = f.read(80)
    if not start.strip() or not start.isascii() or not start.decode().replace('\n', ' ').isprintable():
        return ''
    return f'it is text: {start.decode().strip().splitlines()[0]!r}'


def check_sums(path):
    """Raises: ValueError where a part of an archive is not what was written; torch itself does not look."""
    with zipfile.ZipFile(path) as archive:
        part = archive.testzip()
    if part is not None:
        raise ValueError(f'damaged: {part} has another checksum than when it was written')


def stand_ins(path):
    """For each class and function in a file that `INERT` lists: (what it is read as, its name)."""
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(Inert, name) for name in foreign if re.fullmatch(INERT, name)]


def telling_line(error):
    """The line of an error's message that says most: torch names a class that it refuses (GLOBAL) further
    down, after its advice to read the file unsafely, which is left out."""
    lines = [line for line in str(error).splitlines() if line.strip() and 'weights_only' not in line]
    if not lines:
        return type(error).__name__
    for line in lines:
        if 'GLOBAL' in line:
            return line.partition('. Please use')[0].strip()
    return lines[0]
