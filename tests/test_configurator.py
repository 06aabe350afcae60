"""configurator.py: precedence, types and messages."""

import importlib
import sys
import time
from dataclasses import dataclass, fields

import pytest

from configurator import configure, echo, help_text
from plumbing.console import clock, progress
from train import TrainConfig


@dataclass
class Settings:
    # sizes
    n_layer: int = 2            # blocks
    lr: float = 1e-3            # learning rate
    use_vision: bool = True     # look at the picture
    out_dir: str = 'out'        # where to write
    top_k: int | None = None    # draw from the k likeliest
    compile: bool | None = None # compile, or decide by device


@dataclass
class Picky:
    out_dir: str | None = None  # the run, needed
    top_k: int | None = 3       # draw from the k likeliest

    def __post_init__(self):
        raise ValueError('out_dir: needed')


def given(*argv):
    return configure(Settings, list(argv))[0]


def write(tmp_path, text, name='c.py'):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_precedence(tmp_path):
    """Defaults < files from left to right < flags, wherever the flags stand; the echo says where a value comes from."""
    a, b = write(tmp_path, 'n_layer = 3\nlr = 1', 'a.py'), write(tmp_path, 'n_layer = 4', 'b.py')
    assert given() == Settings()
    assert (given(a).n_layer, given(a, b).n_layer, given(b, a).n_layer) == (3, 4, 3)
    assert given('--n_layer=5', a, b).n_layer == 5
    assert given(a).lr == 1.0 and type(given(a).lr) is float
    text = echo(*configure(Settings, [a, '--lr=0.5']))
    assert f'n_layer = 3 ({a})' in text and 'lr = 0.5 (flag)' in text and 'out_dir' not in text


@pytest.mark.parametrize('flag, key, value', [
    ('--n_layer=1e2', 'n_layer', 100), ('--lr=1', 'lr', 1.0), ('--lr=1e-4', 'lr', 1e-4), ('--use_vision=false', 'use_vision', False),
    ('--use_vision=FALSE', 'use_vision', False), ('--use_vision=True', 'use_vision', True), ('--out_dir=123', 'out_dir', '123'),
    ('--out_dir=a=b', 'out_dir', 'a=b'), ('--out_dir=./out', 'out_dir', './out'), ('--top_k=5', 'top_k', 5),
    ('--top_k=None', 'top_k', None), ('--compile=false', 'compile', False), ('--compile=None', 'compile', None), ('--out_dir=', 'out_dir', '')])
def test_values(flag, key, value):
    """A flag's text becomes the type of its setting, and nothing else."""
    assert getattr(given(flag), key) == value and type(getattr(given(flag), key)) is type(value)


@pytest.mark.parametrize('flag, message', [
    ('--n_layer=32.5', '--n_layer=32.5: expected a whole number'), ('--n_layer=two', 'a whole number'), ('--n_layer=', 'a whole number'),
    ('--n_layer=inf', 'a whole number'), ('--n_layer=1e400', 'a whole number'), ('--lr=nan', 'a finite number'), ('--lr=inf', 'a finite number'),
    ('--use_vision=0', 'true or false'), ('--use_vision=no', 'true or false'), ('--n_layers=3', 'did you mean n_layer?'),
    ('--use_vision', 'a flag is written --key=value'), ('-n_layer=3', '--n_layer=VALUE'), ('--n_layer', '--n_layer=VALUE'),
    ('--__name__=z', 'no such setting'), ('--config_keys=[]', 'no such setting'), ('--top_k=few', 'a whole number or None')])
def test_bad_flags(flag, message):
    """Every bad flag is refused with a message that says what was expected."""
    with pytest.raises(ValueError) as error:
        given(flag)
    assert message in str(error.value) and flag.split('=')[0].lstrip('-') in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('n_layr = 3', 'n_layr: no such setting (did you mean n_layer?)'), ('n_layer = "3"', "n_layer = '3': expected a whole number, got str"),
    ('use_vision = 1', 'true or false, got int'), ('n_layer = True', 'a whole number, got bool'), ('lr = float("nan")', 'a finite number'),
    ('n_layer = = 3', 'line 1: not Python'), ('helper = 3', 'a helper name may start with _'),
    ('n_layer = 3\nuse_vision = false', "line 2: NameError: name 'false' is not defined; Python writes True, False and None"), ('n_layer = 1 // 0', 'line 1: ZeroDivisionError')])
def test_bad_files(tmp_path, text, message):
    """A misspelt name or a wrong type in a config file is refused too, and the file is named."""
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        given(path)
    assert message in str(error.value) and path in str(error.value)


def test_words_without_dashes():
    """`n_layer=3` and `--n_layer 3` get a hint and not a puzzle."""
    with pytest.raises(FileNotFoundError, match='did you mean --n_layer=3'):
        given('n_layer=3')
    with pytest.raises(ValueError, match='--n_layer=VALUE'):
        given('--n_layer', '3')
    with pytest.raises(FileNotFoundError, match='no such config file'):
        given('config/nothing.py')


@pytest.mark.parametrize('key, meant', [
    ('lr', 'learning_rate'), ('bs', 'batch_size'), ('wd', 'weight_decay'), ('epochs', 'max_steps'), ('steps', 'max_steps'), ('batch', 'batch_size'), ('layers', 'n_layer'),
    ('heads', 'n_head'), ('dim', 'n_embd'), ('width', 'n_embd'), ('num_epochs', 'max_steps'), ('gradient_accumulation_steps', 'grad_accum'), ('batch-size', 'batch_size'),
    ('data_dir', 'dataset'), ('output_dir', 'out_dir'), ('LR', 'learning_rate'), ('clip', 'grad_clip')])
def test_names_of_other_programs(key, meant):
    """What other programs call a setting leads to its name here; a value after a space is put into the hint."""
    with pytest.raises(ValueError, match=f'no such setting .did you mean {meant}[?]'):
        configure(TrainConfig, [f'--{key}=1'])
    with pytest.raises(ValueError, match=f'{meant}[?].; did you mean --{key}=1[?]'):
        configure(TrainConfig, [f'--{key}', '1'])


def test_paths_are_expanded(tmp_path, monkeypatch):
    """~ and variables at the start of a text are taken as a shell takes them, in flags and files; anywhere else they stay."""
    monkeypatch.setenv('HOME', str(tmp_path))
    for text, path in (('~/x', tmp_path / 'x'), ('$HOME/x', tmp_path / 'x'), ('${HOME}/x', tmp_path / 'x'), ('~', tmp_path), ('a~b/$HOME', 'a~b/$HOME')):
        assert given(f'--out_dir={text}').out_dir == given(write(tmp_path, f'out_dir = {text!r}')).out_dir == str(path)


def test_files_are_python(tmp_path):
    """A config file may compute, import and use helper names that start with an underscore."""
    assert given(write(tmp_path, 'import math\n_base = 2\nn_layer = int(math.sqrt(_base * 8))')).n_layer == 4


def test_help_shows_what_a_config_means(tmp_path, capsys):
    """--help beside files and flags shows the values that they give, and where each comes from."""
    (tmp_path / 'c.py').write_text('n_layer = 3\n')
    with pytest.raises(SystemExit):
        configure(TrainConfig, [str(tmp_path / 'c.py'), '--help', '--n_head=8'])
    text = capsys.readouterr().out
    assert '--n_layer=3 ' in text and f'[{tmp_path / "c.py"}] ' in text and '--n_head=8 ' in text and '[flag] ' in text and '--n_embd=128 ' in text


def test_help_where_settings_are_refused(tmp_path, capsys):
    """--help shows the last value given, and works where a setting is missing or settings contradict each other."""
    path = write(tmp_path, 'top_k = 4')
    for argv, shown in ([], '--top_k=3 '), ([path], f'[{path}] draw'), ([path, '--top_k=None'], '--top_k=None '):
        with pytest.raises(SystemExit):
            configure(Picky, [*argv, '-h'], 'eval.py')
        text = capsys.readouterr().out
        assert shown in text and '--out_dir=None ' in text and 'python eval.py' in text
        assert ('[' in text.split('--top_k')[1]) == bool(argv)


def test_help(capsys):
    """--help lists every setting of training with type, default and comment, and runs nothing."""
    with pytest.raises(SystemExit):
        configure(TrainConfig, ['--help'])
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f'--{name}=' in text
    assert 'AdamW' in text and 'float' in text and 'out/trm' in text


@pytest.mark.parametrize('flag', ['--n_layer=-1', '--batch_size=0', '--learning_rate=-1', '--ema=1', '--stage=tran', '--dtype=int8',
                                  '--tokenizer=gpt3'])
def test_ranges(flag):
    """A value out of range is refused when the settings are made, and the message names it."""
    with pytest.raises(ValueError, match=flag[2:].split('=')[0]):
        configure(TrainConfig, [flag])


def test_no_blind_encoder_training():
    """Settings that contradict each other are refused."""
    with pytest.raises(ValueError, match='train_encoder'):
        configure(TrainConfig, ['--train_encoder=true', '--use_vision=false'])
    with pytest.raises(ValueError, match='encoder_lr=0.1: the encoder is frozen'):
        configure(TrainConfig, ['--encoder_lr=0.1'])


@pytest.mark.parametrize('console, said', [(True, range(1, 11)), (False, [4, 8, 10])])
def test_progress(console, said, capsys, monkeypatch):
    """A console has progress at every step; a log, which keeps what a console overwrites, every half minute and at the end."""
    now = [1000.]
    monkeypatch.setattr(time, 'time', lambda: now[0])
    monkeypatch.setattr(progress, 'said', 0)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: console)
    for done in range(1, 11):
        now[0] += 9
        progress('reading', done, 10, 1000.)
    assert capsys.readouterr().out == ''.join(f'\rreading | {done}/10 | eta {clock(9 * (10 - done))} ' for done in said)


@pytest.mark.parametrize('module, name', [
    ('train', 'TrainConfig'), ('eval', 'EvalConfig'), ('align.config', 'AlignConfig'), ('align.judge', 'JudgeConfig'), ('lab.bench', 'BenchConfig'), ('lab.states', 'StatesConfig'),
    ('lab.passes', 'PassesConfig'), ('lab.depths', 'DepthsConfig'), ('lab.guess', 'GuessConfig'), ('lab.cells', 'CellsConfig'), ('prepare.mosaics', 'Config'), ('lab.compare', 'CompareConfig'), ('prepare', 'ImportConfig'), ('prepare.shapes', 'Config'), ('prepare.sortofclevr', 'Config')])
def test_help_lists_every_setting(module, name):
    """No setting is missing from --help, which reads a setting, its value and its comment off one line of the source."""
    config = getattr(importlib.import_module(module), name)
    text = help_text(config, 'x.py', {}, {})
    assert [f.name for f in fields(config) if f'--{f.name}=' not in text] == []
