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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_whole(path, write):
    """Calls write(file) on a temporary file and puts it in place: `path` is the old or the new file, never a
    part of one. Of several processes that work together only the first one writes. Raises: OSError naming the
    path, where the disk is full, say."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 and int(os.environ.get('RANK', 0)):
        return
    path = Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        with open(partial, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        full = (
            e if isinstance(e, OSError) else e.__context__
        )  # torch.save, which cannot end its file then, hides it behind a RuntimeError
        if not isinstance(full, OSError):
            raise
        raise OSError(full.errno, full.strerror or str(full), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(file, wait=False):
    """Keeps other processes that ask for the same lock file out, until the block or the process ends, however
    it ends. On Windows, and on a disk that knows no locks, it does not. Raises: ValueError where another
    process is in it, unless `wait`, which waits for that one to finish.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'w') as f:
        if fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise ValueError(
                        f'{file.parent}: another process is writing there; wait for it, or choose another '
                        f'folder'
                    ) from None
                print(f'{file.parent}: another process is writing there, waiting for it', flush=True)
                fcntl.flock(f, fcntl.LOCK_EX)
            except OSError as e:
                print(
                    f'{file}: no lock is to be had here ({e.strerror}); see to it that no other process '
                    f'writes to {file.parent}'
                )
        yield


DAMAGED = (
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)  # what reading a bad archive raises, beside ValueError


def safe_load(path):
    """torch.load of tensors and plain types only: nothing in the file is run. The settings that Edge-Glass
    pickled into its checkpoints, classes of its module `config`, become empty objects. Files up to 1 GB are
    held against their checksums, larger ones are memory-mapped. Raises: ValueError for everything else."""
    try:
        zipped, large = zipfile.is_zipfile(path), os.path.getsize(path) >= 2**30
        if zipped and not large:
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise ValueError(f'damaged: {part} has another checksum than when it was written')
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        inert = [
            (type('Settings', (), {}), name) for name in foreign if re.fullmatch(r'config\.\w+Config', name)
        ]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped and large)
    except (ValueError, *DAMAGED) as e:
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        telling = next((line.strip() for line in lines if 'GLOBAL' in line), lines[0])
        raise ValueError(f'{path}: not a file that can be read safely ({telling[:200]})') from None
