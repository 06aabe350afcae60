"""
Settings: defaults <- config files <- flags.

    python train.py config/trm.py --inner_steps=8 --out_dir=out/deep

The defaults are the fields of a dataclass at the top of the script that uses them, each with its type and a
comment. A config file is Python (your own code: it is executed) whose top-level names override the defaults;
several are read from left to right. Flags override files, wherever they stand. A name that is not a setting,
or a value that is not of its setting's type, is an error that says what was expected. A text that begins with
~ or a variable, as paths do, is taken as a shell would take it.

    python train.py config/trm.py --help    # every setting, and what a config makes of it
"""

import difflib
import inspect
import math
import os
import re
import traceback
import types
import typing
from dataclasses import fields
from itertools import product
from pathlib import Path

HELP = ('-h', '--help')

# what other programs call a setting, where no word of it is ours
ELSEWHERE = dict(dim='n_embd', width='n_embd', d_model='n_embd', hidden_size='n_embd', hidden_dim='n_embd',
                 embed_dim='n_embd', epoch='max_steps', iter='max_steps', iteration='max_steps',
                 depth='n_layer', bsz='batch_size', precision='dtype', gpu='device', image_size='encoder_px',
                 overwrite='fresh', data='dataset', data_dir='dataset', save_dir='out_dir', input='source')


def configure(cls, argv, prog='train.py'):
    """Builds `cls`, a dataclass, from its defaults, config files and flags.

    Shapes: argv, a list such as ['config/trm.py', '--n_layer=2'] -> (settings, sources), an instance of `cls`
        and a dict that says for every setting that was given where it comes from.
    Raises: ValueError for an unknown name, a value of the wrong type or out of range, a flag that is not
        --key=value; FileNotFoundError for a missing config file; SystemExit after printing --help.
    """
    kinds = {f.name: f.type for f in fields(cls)}
    files = [arg for arg in argv if not arg.startswith('-')]
    flags = [arg for arg in argv if arg.startswith('-') and arg not in HELP]
    values = {}
    sources = {}
    # first of all, as `--key value` would be taken for a flag and a file
    for flag in flags:
        if not flag.startswith('--') or '=' not in flag:
            raise ValueError(f'{flag}: a flag is written --key=value, for example '
                             f'{example(flag, argv, kinds)}')
    for file in files:
        for key, value in read_config_file(file, kinds).items():
            values[key] = check_type(key, value, kinds[key], file)
            sources[key] = file
    for flag in flags:
        key, _, text = flag.removeprefix('--').partition('=')
        if key not in kinds:
            raise ValueError(f'--{key}: no such setting{nearest(key, kinds)}; --help lists them all')
        values[key] = parse(key, text, kinds[key])
        sources[key] = 'flag'
    # before the settings are made: help is wanted most where they do not go together
    if any(arg in HELP for arg in argv):
        print(help_text(cls, prog, values, sources))
        raise SystemExit(0)
    settings = cls(**values)
    # here, so that model.py needs this page and no other
    from plumbing.console import text_settings
    # an error about a path says which setting it is of
    named = {key: value for key, value in vars(settings).items() if isinstance(value, str) and value}
    text_settings.clear()
    text_settings.update(named)
    return settings, sources


def example(flag, argv, settings):
    """How a flag is written that stands without its value, or with one dash."""
    name, _, value = flag.lstrip('-').partition('=')
    hint = nearest(name, settings)
    after = argv[argv.index(flag) + 1:][:1]
    if after and not value and not after[0].startswith('-'):
        hint += f'; did you mean --{name}={after[0]}?'
    return f'--{name}=VALUE (one word, no space; true or false for a switch){hint}'


def read_config_file(file, settings):
    """Runs a config file in a namespace of its own and returns its top-level names that are settings, as a
    dict."""
    path = Path(file)
    if not path.is_file():
        hint = f' (flags are written --key=value: did you mean --{file}?)' if '=' in file else ''
        raise FileNotFoundError(f'{file}: no such config file{hint}; the ready ones are in config/')
    try:
        code = compile(path.read_bytes(), file, 'exec')
    except SyntaxError as e:
        line = f', line {e.lineno}' if e.lineno else ''
        raise ValueError(f'{file}{line}: not Python: {e.msg}') from None
    except ValueError as e:  # null bytes
        raise ValueError(f'{file}: not Python: {e}') from None
    namespace = {}
    try:
        exec(code, namespace)
    except Exception as e:
        # the error may come from far below: the last line of the file itself is where to look
        line = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file][-1]
        raise ValueError(f'{file}, line {line}: {type(e).__name__}: {e}{python_hint(e)}') from None
    values = {}
    for key, value in namespace.items():
        # helpers and imports are the file's own business
        if key.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if key not in settings:
            raise ValueError(f'{file}: {key}: no such setting{nearest(key, settings)}; '
                             f'--help lists them all, and a helper name may start with _')
        values[key] = value
    return values


def python_hint(error):
    """For who writes true where Python writes True: name 'true' is not defined."""
    quoted = str(error).split("'")
    if len(quoted) > 1 and quoted[1] in ('true', 'false', 'none', 'null'):
        return '; Python writes True, False and None'
    return ''


def check_type(key, value, kind, file):
    """A value from a config file, already Python: checks that it is of the setting's type; an int may stand
    for a float."""
    allowed = typing.get_args(kind) or (kind,)
    if float in allowed and type(value) is int:
        value = float(value)
    infinite = type(value) is float and not math.isfinite(value)
    # not isinstance: to Python, True is an int
    if type(value) not in allowed or infinite:
        raise ValueError(f'{file}: {key} = {value!r}: expected {spell(kind)}, got {type(value).__name__}')
    return expanded(key, value) if type(value) is str else value


def parse(key, text, kind):
    """The value of a flag, still text, as the setting's type."""
    allowed = typing.get_args(kind) or (kind,)
    if type(None) in allowed and text == 'None':
        return None
    if str in allowed:
        return expanded(key, text)
    try:
        if bool in allowed:
            return {'true': True, 'false': False}[text.lower()]
        if int in allowed:
            return whole_number(text)
        if float in allowed:
            return finite_number(text)
    except (ValueError, KeyError, OverflowError):
        pass
    raise ValueError(f'--{key}={text}: expected {spell(kind)}')


def expanded(key, text):
    """A text that begins with ~ or a variable, as a shell would take it where it is a path. Raises:
    ValueError where no file could have that name."""
    if '\0' in text:
        raise ValueError(f'{key}={text!r}: expected text without null characters')
    if text.startswith(('~', '$')):
        return os.path.expanduser(os.path.expandvars(text))
    return text


def whole_number(text):
    """1e5 is a whole number, 32.5 is not. Raises: ValueError, OverflowError."""
    if not re.search('[eE]', text):
        return int(text)
    number = float(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def finite_number(text):
    """Raises: ValueError."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def spell(kind):
    """What a value of this type is called in a message."""
    words = {bool: 'true or false', int: 'a whole number', float: 'a finite number', str: 'text',
             type(None): 'None'}
    return ' or '.join(words[k] for k in typing.get_args(kind) or (kind,))


def nearest(key, names):
    """A hint at the name that was meant, if one is close: in letters, by its initials (lr), in a word, or as
    other programs call it."""
    if key in names:
        return ''
    key = key.lower().replace('-', '_')
    bare = re.sub('^(n|num|max|min)_|s$', '', key)
    close = [name for name in names if name in (key, ELSEWHERE.get(key), ELSEWHERE.get(bare))]
    close += [name for name in names if ''.join(word[0] for word in name.split('_') if word) == key]
    close += difflib.get_close_matches(key, names, n=1)
    most = max(shared_words(name, key) for name in names)
    alike = [name for name in names if most and shared_words(name, key) == most]
    close += difflib.get_close_matches(key, alike, n=1, cutoff=0)
    return f' (did you mean {close[0]}?)' if close else ''


def shared_words(name, key):
    """How many words of a name begin as a word of the other, or the other way round: grad and gradient."""
    pairs = product(name.split('_'), key.split('_'))
    return sum(min(len(a), len(b)) > 2 and (a.startswith(b) or b.startswith(a)) for a, b in pairs)


def help_text(cls, prog, values, sources):
    """Every setting with type, value and the comment beside it, under the comments that head its group in
    the source. A value that the files or flags beside --help give says where it comes from."""
    lines = [f'usage: python {prog} [config/FILE.py ...] [--key=value ...]', '']
    # the source has the comments, which a class does not keep; its first two lines are its head
    for line in inspect.getsource(cls).splitlines()[2:]:
        if setting := re.match(r'    (\w+): ([^=#]+?) = (.+?)\s+# (.*)', line):
            key, kind, value, comment = setting.groups()
            if key in values:
                value = repr(values[key])
                comment = f'[{sources[key]}] {comment}'
            lines.append(f'  --{key + "=" + value:36} {kind:12} {comment}')
        elif heading := re.match(r'    # (.*)', line):
            lines += ['', heading[1]]
        elif re.match(r'    def ', line):
            break
    lines += ['', f"  {'--debug':38} {'':12} show the stack trace of an error"]
    return '\n'.join(lines)


def echo(settings, sources):
    """The settings that differ from their defaults, a line each, with where they come from."""
    lines = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value != f.default:
            lines.append(f'{f.name} = {value!r} ({sources[f.name]})')
    return '\n'.join(lines)


def expect(config, **choices):
    """Raises ValueError where a setting is none of its choices."""
    for key, allowed in choices.items():
        if getattr(config, key) not in allowed:
            raise ValueError(f'{key}={getattr(config, key)}: expected one of {", ".join(allowed)}')
