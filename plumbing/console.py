"""What every script says, and how it ends: messages, progress, tables."""

import errno
import signal
import sys
import time


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
        end(str(e) or 'stopped; what is finished is kept, and the same command goes on from there', code=130)
    except BrokenPipeError:  # | head
        raise SystemExit(1)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        if isinstance(e, OSError) and e.strerror and '--debug' not in sys.argv:
            room = '; make room: what was finished is kept, and the same command goes on from there' * (
                e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            )
            end(f'error: {f"{e.filename}: " if e.filename else ""}{e.strerror}{room}', code=1)
        full = (
            isinstance(e, MemoryError)
            or 'out of memory' in str(e).lower()
            or 'allocate memory' in str(e).lower()
        )
        if (
            '--debug' in sys.argv or isinstance(e, RuntimeError) and not full
        ):  # the latter is a fault of this code
            raise
        end(
            f'error: out of memory: a smaller --batch_size is the usual remedy; {e}'
            if full
            else f'error: {e}',
            code=1,
        )


def end(message, code):
    print('\n' * sys.stdout.isatty() + printable(message), file=sys.stderr)
    raise SystemExit(code)


def printable(text):
    """Text without control characters, fit for a terminal and for a picture."""
    return ''.join(ch if ch.isprintable() else ' ' for ch in text)


def clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def progress(what, done, n, start):
    """Says on the console how far a long loop is that began at time `start`, over what it said before; in a
    log, which keeps everything, every half minute."""
    now = time.time()
    if sys.stdout.isatty() or done >= n or now > max(start, progress.said) + 30:
        progress.said = now
        print(
            f'\r{what} | {done}/{n} | eta {clock((now - start) / max(1, done) * (n - done))} ',
            end='',
            flush=True,
        )


progress.said = 0


def row_done(what, i, n, start, every=20000):
    """Says how far a loop over rows is, now and then."""
    if (i + 1) % every == 0:
        progress(what, i + 1, n, start)
        print(end='\n' * (i + 1 + every > n))


def table(head, rows):
    """Rows of cells as a Markdown table."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        '| ' + ' | '.join(f'{str(cell):>{w}}' for cell, w in zip(row, widths)) + ' |' for row in [head, *rows]
    ]
    lines.insert(1, '|' + '|'.join('-' * (w + 1) + ':' for w in widths) + '|')
    return '\n'.join(lines) + '\n'
