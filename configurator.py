"""
Settings: defaults <- config files <- flags. And what all scripts share beside them: errors as messages, files that appear whole, locks.

    python train.py config/trm.py --inner_steps=8 --out_dir=out/deep

The defaults are the fields of a dataclass at the top of the script that uses them, each with its type and a comment. A
config file is Python (your own code: it is executed) whose top-level names override the defaults; several are read from
left to right. Flags override files, wherever they stand. A name that is not a setting, or a value that is not of its
setting's type, is an error that says what was expected.

    python configurator.py config/trm.py    # print what a config means
"""

import ctypes
import difflib
import errno
import inspect
import math
import os
import re
import signal
import sys
import time
import traceback
import types
import typing
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def configure(cls, argv, prog='train.py'):
    """Builds `cls`, a dataclass, from its defaults, config files and flags.

    Shapes: argv, a list such as ['config/trm.py', '--n_layer=2'] -> (settings, sources), an instance of `cls` and a dict
        that says for every setting that was given where it comes from.
    Raises: ValueError for an unknown name, a value of the wrong type or out of range, a flag that is not --key=value;
        FileNotFoundError for a missing config file; SystemExit after printing --help.
    """
    if '-h' in argv or '--help' in argv:
        print(help_text(cls, prog))
        raise SystemExit(0)
    kinds = {f.name: f.type for f in fields(cls)}
    values, sources = {}, {}
    files = [arg for arg in argv if not arg.startswith('-')]
    flags = [arg for arg in argv if arg.startswith('-')]
    for flag in flags:
        if not flag.startswith('--') or '=' not in flag:
            raise ValueError(f'{flag}: a flag is written --key=value, for example --{flag.lstrip("-").split("=")[0]}=VALUE '
                             f'(one word, no space; true or false for a switch)')
    for file in files:
        for key, value in read_config_file(file, kinds).items():
            values[key], sources[key] = check_type(key, value, kinds[key], file), file
    for flag in flags:
        key, _, text = flag.removeprefix('--').partition('=')
        if key not in kinds:
            raise ValueError(f'--{key}: no such setting{nearest(key, kinds)}; --help lists them all')
        values[key], sources[key] = parse(key, text, kinds[key]), 'flag'

    return cls(**values), sources


def read_config_file(file, settings):
    """Runs a config file in a namespace of its own and returns its top-level names that are settings, as a dict."""
    path = Path(file)
    if not path.is_file():
        hint = f' (flags are written --key=value: did you mean --{file}?)' if '=' in file else ''
        raise FileNotFoundError(f'{file}: no such config file{hint}; the ready ones are in config/')
    namespace = {}
    try:
        code = compile(path.read_bytes(), file, 'exec')
    except (SyntaxError, ValueError) as e:  # ValueError: null bytes
        line = f', line {e.lineno}' if getattr(e, 'lineno', None) else ''
        raise ValueError(f'{file}{line}: not Python: {getattr(e, "msg", e)}') from None
    try:
        exec(code, namespace)
    except Exception as e:
        line = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file][-1]
        python = '; Python writes True, False and None' * (str(e).split("'")[1:2] in (['true'], ['false'], ['none'], ['null']))
        raise ValueError(f'{file}, line {line}: {type(e).__name__}: {e}{python}') from None
    namespace = {k: v for k, v in namespace.items() if not k.startswith('_') and not isinstance(v, types.ModuleType)}
    for key in namespace:
        if key not in settings:
            raise ValueError(f'{file}: {key}: no such setting{nearest(key, settings)}; '
                             f'--help lists them all, and a helper name may start with _')
    return namespace


def check_type(key, value, kind, file):
    """A value from a config file, already Python: checks that it is of the setting's type; an int may stand for a float."""
    allowed = typing.get_args(kind) or (kind,)
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f'{file}: {key} = {value!r}: expected {spell(kind)}, got {type(value).__name__}')
    return value


def parse(key, text, kind):
    """The value of a flag, still text, as the setting's type. A string is taken as it stands."""
    allowed = typing.get_args(kind) or (kind,)
    if type(None) in allowed and text == 'None':
        return None
    try:
        if bool in allowed:
            return {'true': True, 'false': False}[text.lower()]
        if int in allowed:
            number = float(text) if re.search('[eE]', text) else int(text)  # 1e5 is a whole number, 32.5 is not
            if number == int(number):
                return int(number)
        elif float in allowed:
            if math.isfinite(float(text)):
                return float(text)
        else:
            return text
    except (ValueError, KeyError, OverflowError):
        pass
    raise ValueError(f'--{key}={text}: expected {spell(kind)}')


def spell(kind):
    words = {bool: 'true or false', int: 'a whole number', float: 'a finite number', str: 'text', type(None): 'None'}
    return ' or '.join(words[k] for k in typing.get_args(kind) or (kind,))


def nearest(key, names):
    close = difflib.get_close_matches(key, names, n=1)
    return f' (did you mean {close[0]}?)' if close else ''


def help_text(cls, prog):
    """Every setting with type, default and the comment beside it, under the comments that head its group in the source."""
    lines = [f'usage: python {prog} [config/FILE.py ...] [--key=value ...]', '']
    for line in inspect.getsource(cls).splitlines()[2:]:
        if setting := re.match(r'    (\w+): ([^=#]+?) = (.+?)\s+# (.*)', line):
            key, kind, default, comment = setting.groups()
            lines.append(f'  --{key + "=" + default:36} {kind:12} {comment}')
        elif heading := re.match(r'    # (.*)', line):
            lines += ['', heading[1]]
        elif re.match(r'    def ', line):
            break
    lines += ['', f"  {'--debug':38} {'':12} show the stack trace of an error"]
    return '\n'.join(lines)


def echo(settings, sources):
    """The settings that differ from their defaults, a line each, with where they come from."""
    changed = [f for f in fields(settings) if getattr(settings, f.name) != f.default]
    return '\n'.join(f'{f.name} = {getattr(settings, f.name)!r} ({sources[f.name]})' for f in changed)


# ----------------------------------------------------------------------------
# what all scripts share

def run_script(main):
    """Runs main(argv). What a user can mend ends it with one message and an exit code that is not zero, --debug with the stack trace too.

    SIGTERM is taken as Ctrl-C, which a script answers by saving what it has.
    """
    argv = [arg for arg in sys.argv[1:] if arg != '--debug']
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(argv)
    except KeyboardInterrupt as e:
        end(str(e) or 'stopped; what is finished is kept, and the same command goes on from there', code=130)
    except BrokenPipeError:  # | head
        raise SystemExit(1)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        if isinstance(e, OSError) and e.strerror and '--debug' not in sys.argv:
            room = '; make room: what was finished is kept, and the same command goes on from there' * (e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
            end(f'error: {f"{e.filename}: " if e.filename else ""}{e.strerror}{room}', code=1)
        full = isinstance(e, MemoryError) or 'out of memory' in str(e).lower() or 'allocate memory' in str(e).lower()
        if '--debug' in sys.argv or isinstance(e, RuntimeError) and not full:  # the latter is a fault of this code
            raise
        end(f'error: out of memory: a smaller --batch_size is the usual remedy; {e}' if full else f'error: {e}', code=1)


def end(message, code):
    print('\n' * sys.stdout.isatty() + printable(message), file=sys.stderr)
    raise SystemExit(code)


def printable(text):
    """Text without control characters, fit for a terminal and for a picture."""
    return ''.join(ch if ch.isprintable() else ' ' for ch in text)


def clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def progress(what, done, n, start):
    """Says on the console how far a long loop is that began at time `start`, over what it said before; in a log, which keeps everything, every half minute."""
    now = time.time()
    if sys.stdout.isatty() or done >= n or now > max(start, progress.said) + 30:
        progress.said = now
        print(f'\r{what} | {done}/{n} | eta {clock((now - start) / max(1, done) * (n - done))} ', end='', flush=True)


progress.said = 0


def expect(config, **choices):
    """Raises ValueError where a setting is none of its choices."""
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise ValueError(f'{key}={getattr(config, key)}: expected one of {", ".join(allowed)}')


def pick_device(device):
    """Raises: ValueError where there is no such device."""
    import torch
    device = ('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f'device={device}: not to be had here ({str(e).splitlines()[0][:120]}); expected auto, cpu, cuda or cuda:N') from None
    return device


def fast_dtypes(device):
    """float32, and bfloat16 after it where the hardware multiplies in it; elsewhere it is emulated, a hundred times slower."""
    import torch
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith('cuda') else torch.cpu._is_avx512_bf16_supported()
    return [torch.float32] + [torch.bfloat16] * bf16


def seconds(function, device):
    """Wall clock of a call. On a GPU, waits for it."""
    wait = lambda: None
    if device.startswith('cuda'):
        import torch
        wait = lambda: torch.cuda.synchronize(device)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def most_memory(device):
    """The most bytes that this process has used so far, of the GPU's memory or, on a CPU, of the machine's; 0 where it cannot be told."""
    if device.startswith('cuda'):
        import torch
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def keep_freed_memory():
    """Lets glibc keep the memory that a step frees for the next one, instead of handing it back to Linux and asking for fresh,
    zeroed pages: a quarter of an alignment step on a CPU. Elsewhere it does nothing."""
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallopt'):
            M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD = -3, -1, -2  # malloc.h
            for option, value in ((M_MMAP_THRESHOLD, 2 ** 30), (M_TRIM_THRESHOLD, 2 ** 31 - 1), (M_TOP_PAD, 2 ** 28)):
                libc.mallopt(option, value)


def write_whole(path, write):
    """Calls write(file) on a temporary file and puts it in place: `path` is the old or the new file, never a part of one. Of several
    processes that work together only the first one writes. Raises: OSError naming the path, where the disk is full, say."""
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
        full = e if isinstance(e, OSError) else e.__context__  # torch.save, which cannot end its file then, hides it behind a RuntimeError
        if not isinstance(full, OSError):
            raise
        raise OSError(full.errno, full.strerror or str(full), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(file, wait=False):
    """Keeps other processes that ask for the same lock file out, until the block or the process ends, however it ends. On Windows, and on a disk that
    knows no locks, it does not. Raises: ValueError where another process is in it, unless `wait`, which waits for that one to finish.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'w') as f:
        if fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise ValueError(f'{file.parent}: another process is writing there; wait for it, or choose another folder') from None
                print(f'{file.parent}: another process is writing there, waiting for it', flush=True)
                fcntl.flock(f, fcntl.LOCK_EX)
            except OSError as e:
                print(f'{file}: no lock is to be had here ({e.strerror}); see to it that no other process writes to {file.parent}')
        yield


def show(argv):
    from train import TrainConfig
    print(echo(*configure(TrainConfig, argv, 'configurator.py')))


if __name__ == '__main__':
    run_script(show)
