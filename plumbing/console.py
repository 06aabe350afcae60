"""What every script says, and how it ends: messages, progress, tables."""

import errno
import signal
import sys
import time

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_script(main):
    """Runs main(argv). What a user can mend ends it with one message and an exit code that is not zero,
    --debug with the stack trace too.

    SIGTERM is taken as Ctrl-C, which a script answers by saving what it has.
    """
    argv = [arg for arg in sys.argv[1:] if arg != '--debug']
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(argv)
    except KeyboardInterrupt as e:
        # 130 is what a shell reports of a program that Ctrl-C ended
        end(str(e) or 'stopped; what is finished is kept, and the same command goes on from there', code=130)
    except BrokenPipeError:
        # the output went to `head`, say, which has seen enough
        raise SystemExit(1)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        message = what_to_mend(e)
        if message is None or '--debug' in sys.argv:
            raise
        end(f'error: {message}', code=1)


def what_to_mend(error):
    """What a user is told of an error, or None where it is a fault of this code."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
        if error.filename:
            message = f'{error.filename}: {message}'
        if error.errno in DISK_IS_FULL:
            message += '; make room: what was finished is kept, and the same command goes on from there'
        return message
    text = str(error).lower()
    # torch raises a RuntimeError when memory ends; on a GPU and on a CPU it says so in other words
    if isinstance(error, MemoryError) or 'out of memory' in text or 'allocate memory' in text:
        return f'out of memory: a smaller --batch_size is the usual remedy; {error}'
    if isinstance(error, RuntimeError):
        return None
    return str(error)


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


def row_done(what, i, n, start, every=20000):
    """Says how far a loop over rows is, now and then."""
    if (i + 1) % every == 0:
        progress(what, i + 1, n, start)
        if i + 1 + every > n:
            # the last time: ends the line of progress
            print()


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
