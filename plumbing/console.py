"""What every script says, and how it ends: messages, progress, tables."""

import errno
import os
import signal
import sys
import time

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)
GOES_ON = 'what is finished is kept, and the same command goes on from there'

# the text settings of this script by name, which `configure` puts here: messages say which one a path is of
text_settings = {}


def run_script(main, promise=''):
    """Runs main(argv). What a user can mend ends it with one message and an exit code that is not zero,
    --debug with the stack trace too. `promise`: what a user is told who stops it: `GOES_ON` where it does.

    SIGTERM, and the SIGHUP of a terminal that is closed, are taken as Ctrl-C, which a script answers by
    saving what it has. What is printed never ends a script, see `Console`.
    """
    argv = [arg for arg in sys.argv[1:] if arg != '--debug']
    sys.stdout = Console(sys.stdout)
    sys.stderr = Console(sys.stderr)
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)
    try:
        main(argv)
    except KeyboardInterrupt as e:
        # 130 is what a shell reports of a program that Ctrl-C ended
        end(str(e) or '; '.join(filter(None, ['stopped', promise])), code=130)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        message = what_to_mend(e, promise)
        if message is None or '--debug' in sys.argv:
            raise
        end(f'error: {message}', code=1)


def stop_signals():
    """The signals that ask a script to stop, beside Ctrl-C. SIGHUP stays ignored where nohup asked for that;
    Windows has none."""
    asked = [signal.SIGTERM]
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    return asked


class Console:
    """stdout or stderr, which can never end a run: what it cannot encode is replaced, and once it is gone (a
    pipe that nobody reads, a terminal that was closed, a full disk) what is printed is dropped."""

    def __init__(self, stream):
        # Python has None in its place where the shell closed it: >&-
        self.stream = nowhere() if stream is None else stream
        if hasattr(self.stream, 'reconfigure') and not self.stream.closed:
            self.stream.reconfigure(errors='replace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt('write', text)

    def flush(self):
        return self.attempt('flush')

    def isatty(self):
        return self.attempt('isatty')

    def attempt(self, what, *args):
        try:
            return getattr(self.stream, what)(*args)
        except BlockingIOError:  # its reader is slow: this text is lost, the next one may not be
            return len(args)
        except (OSError, ValueError):  # ValueError: the file is closed
            self.drop()
            return getattr(self.stream, what)(*args)

    def drop(self):
        """From now on nothing is said."""
        gone = self.stream
        self.stream = nowhere()
        try:
            # what `gone` holds back, and writes when Python ends, goes nowhere too
            os.dup2(self.stream.fileno(), gone.fileno())
        except (OSError, ValueError):
            pass


def nowhere():
    """A file for what nobody shall read."""
    return open(os.devnull, 'w', errors='replace')


def what_to_mend(error, promise=''):
    """What a user is told of an error, or None where it is a fault of this code."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
        if error.filename:
            message = f'{setting_of(error.filename)}{cut(error.filename, 200)}: {message}'
        if error.errno in NO_FOLDER:
            message += '; expected a folder, or nothing of this name'
        if error.errno in DISK_IS_FULL:
            message += '; ' + ': '.join(filter(None, ['make room', promise]))
        return message
    text = str(error).lower()
    # torch raises a RuntimeError when memory ends; on a GPU and on a CPU it says so in other words
    if isinstance(error, MemoryError) or 'out of memory' in text or 'allocate memory' in text:
        return f'out of memory: a smaller --batch_size is the usual remedy; {error}'
    if isinstance(error, RuntimeError):
        return None
    return str(error)


def setting_of(path):
    """'--name: ' of the setting whose value a path is, lies in or leads to; '' where there is none."""
    path = os.path.abspath(str(path))
    places = {os.path.abspath(value): name for name, value in text_settings.items()}
    around = [place for place in places if lies_in(path, place)]
    # a folder on the way to it could not be made, or the lock beside it, .NAME.lock
    beside = [place for place in places if lies_in(place, path) or path == lock_beside(place)]
    if around:
        return f'--{places[max(around, key=len)]}: '
    return f'--{places[beside[0]]}: ' if len(beside) == 1 else ''


def lies_in(path, folder):
    return (path + os.sep).startswith(folder + os.sep)


def lock_beside(path):
    """The lock file of a folder that is not there yet."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f'.{name}.lock')


def cut(value, most=80):
    """A value of the data as a message shows it: its beginning and its end, where it is long."""
    text = str(value)
    half = (most - 5) // 2
    return text if len(text) <= most else f'{text[:half]} ... {text[-half:]}'


def first_three(problems):
    """What is wrong, as a message names it: the first three, and dots where there are more."""
    named = '; '.join(problems[:3])
    return named if len(problems) <= 3 else f'{named}; ...'


def end(message, code):
    """Ends the program with a message. Raises: SystemExit, always."""
    if sys.stdout.isatty():
        # below a line of progress, which has no end
        print(file=sys.stderr)
    print(printable(message), file=sys.stderr)
    raise SystemExit(code)


def printable(text):
    """Text without control characters, fit for a terminal and for a picture."""
    return ''.join(ch if ch.isprintable() else ' ' for ch in text)


def clock(seconds):
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def progress(what, done, n, start):
    """Says on the console how far a long loop is that began at time `start`, over what it said before; in a
    log, which keeps everything, every half minute."""
    now = time.time()
    if sys.stdout.isatty() or done >= n or now > max(start, progress.said) + 30:
        progress.said = now
        seconds_each = (now - start) / max(1, done)
        eta = clock(seconds_each * (n - done))
        print(f'\r{what} | {done}/{n} | eta {eta} ', end='', flush=True)


progress.said = 0  # when it last said something


def say_if_few(n, what, split='val', enough=50):
    """Says that the scores of a split are luck where there are few questions or pictures in it."""
    if n < enough:
        print(f'{split}: {n} {what} only: a score of so few is mostly luck, one counts for {1 / n:.3f}; '
              f'{enough} and more tell something')


def row_done(what, i, n, start, every=20000):
    """Says how far a loop over rows is, now and then."""
    if (i + 1) % every == 0:
        progress(what, i + 1, n, start)
        if i + 1 + every > n:
            # the last time: ends the line of progress
            print()


def typed_lines(prompt):
    """Yields the lines that are typed after a prompt, or that come from a pipe, until one is empty or the end
    is there."""
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='replace')  # what is no text is a bad question, not the end
    prompt = prompt if sys.stdin.isatty() else ''
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def table(head, rows):
    """Rows of cells as a Markdown table."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [f'{str(cell):>{width}}' for cell, width in zip(row, widths)]
        lines.append('| ' + ' | '.join(cells) + ' |')
    # a colon at the end of the dashes sets a column to the right, as numbers want it
    rule = '|'.join('-' * (width + 1) + ':' for width in widths)
    lines.insert(1, f'|{rule}|')
    return '\n'.join(lines) + '\n'
