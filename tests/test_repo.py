"""The repository: what the README says exists, every config loads, the files are the ones they should be."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest
from conftest import ROOT

import encoder
import train
from configurator import configure
from eval import EvalConfig
from model import BenchConfig
from prepare import ImportConfig
from prepare.shapes import Config as ShapesConfig
from train import TrainConfig

README = (ROOT / 'README.md').read_text()
COMMANDS = [line.strip() for block in re.findall(r'```(?:sh|bash)\n(.*?)```', README, re.S)
            for line in block.splitlines() if line.strip() and not line.lstrip().startswith('#')]


def test_top_level_files():
    """One file per concept, and no other Python file at the top."""
    assert {p.name for p in ROOT.glob('*.py')} == {'model.py', 'data.py', 'train.py', 'eval.py', 'encoder.py', 'configurator.py'}


@pytest.mark.parametrize('config', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_configs_load(config):
    """Every config is valid, opens with its purpose and writes to a folder of its own, named after it."""
    settings, _ = configure(TrainConfig, [str(ROOT / 'config' / config)])
    assert (ROOT / 'config' / config).read_text().startswith('# ')
    assert settings.out_dir == f'out/{config.removesuffix(".py")}'


def test_pixmo_configs_agree():
    """The baseline at full size differs from its TRM in the decoder alone."""
    trm, plain = (configure(TrainConfig, [str(ROOT / f'config/{name}_pixmo.py')])[0] for name in ('trm', 'plain'))
    assert {f.name for f in fields(trm) if getattr(trm, f.name) != getattr(plain, f.name)} == {'out_dir', 'kind', 'n_layer'}


@pytest.mark.parametrize('command', COMMANDS)
def test_readme_commands(command):
    """Every command of the README names files that exist and settings that are accepted."""
    for part in command.split('#')[0].split('&&'):
        words = shlex.split(part)
        if words[:2] == ['python', 'train.py']:
            configure(TrainConfig, [str(ROOT / w) if w.startswith('config/') else w for w in words[2:] if w != '--help'])
        elif words[:2] == ['python', 'eval.py']:
            configure(EvalConfig, words[2:])
        elif words[:3] == ['python', 'data.py', 'shapes']:
            configure(ShapesConfig, words[3:])
        elif words[:2] == ['python', 'data.py']:
            configure(getattr(importlib.import_module(f'prepare.{words[2]}'), 'Config', ImportConfig), words[3:])
        elif words[:1] == ['python'] and words[1].endswith('.py'):
            assert (ROOT / words[1]).is_file()
        elif words[:1] == ['torchrun']:
            configure(TrainConfig, [str(ROOT / w) for w in words[words.index('train.py') + 1:]])
        elif words[:3] == ['pip', 'install', '-r']:
            assert (ROOT / words[3]).is_file()
        else:
            assert words[0] in ('cp', 'git', 'cd') or words == ['python', '-m', 'pytest'] or words[:2] == ['bash', '.ci/run'], command


@pytest.mark.parametrize('config', [TrainConfig, EvalConfig, ShapesConfig, ImportConfig])
def test_every_setting_is_tested(config):
    """No setting that neither a test uses nor a config; those of training and evaluation are given as a flag or set by a config."""
    used = '\n'.join(path.read_text() for path in (*ROOT.glob('tests/test_*.py'), *ROOT.glob('config/*.py')))
    how = '--{0}=|^{0} = ' if config in (TrainConfig, EvalConfig) else r'\b{0} ?='
    assert [f.name for f in fields(config) if not re.search(how.format(f.name), used, re.M)] == []


def test_pixmo_timing(tmp_path, monkeypatch):
    """config/pixmo_timing.sh makes pictures and an encoder that config/trm_pixmo.py takes; here of another size than the true one."""
    made = re.search(r"<<'DRAW'\n(.*?)\nDRAW\n", (ROOT / 'config/pixmo_timing.sh').read_text(), re.S).group(1)
    monkeypatch.setattr(encoder, 'EDGE_GLASS_CONFIG', encoder.EncoderConfig(width=32, n_layer=1, n_latents=4, vision_dim=512, prefixes=(512,)))
    monkeypatch.setattr(sys, 'argv', ['-', '40', str(tmp_path)])
    exec(compile(made, 'pixmo_timing.sh', 'exec'), {})
    train.main([str(ROOT / 'config/trm_pixmo.py'), f'--dataset={tmp_path}/data', f'--encoder={tmp_path}/encoder.pt', '--tokenizer=bpe', f'--cache_dir={tmp_path}/cache',
                f'--out_dir={tmp_path}/run', '--max_steps=1', '--eval_interval=1', '--batch_size=4', '--n_embd=32', '--n_head=2', '--device=cpu'])
    assert (tmp_path / 'run/metrics.json').is_file()


@pytest.mark.parametrize('groups, least', [([], 40), (['gpu'], 10), (['T2', 'width'], 5)])
def test_experiments(groups, least):
    """Every run of config/experiments.sh, whether it is done or not, has settings that are accepted."""
    listed = subprocess.run(['bash', 'config/experiments.sh', *groups], cwd=ROOT, env=os.environ | dict(LIST='1', SEEDS='99'), capture_output=True, text=True, check=True)
    names, commands = set(), [line.split() for line in listed.stdout.splitlines()[1:]]
    for python, script, *argv in commands:
        settings, _ = configure(TrainConfig, [str(ROOT / a) if a.startswith('config/') else a for a in argv])
        names.add(settings.out_dir)
    assert len(names) == len(commands) >= least


@pytest.mark.parametrize('results, left', [('', 0), ('out/again', 1)])
def test_experiments_again(results, left):
    """A run whose result is in results/runs is not made again, unless its result is to lie elsewhere."""
    listed = subprocess.run(['bash', 'config/experiments.sh', 'trm'], cwd=ROOT, env=os.environ | dict(LIST='1', SEEDS='1', RESULTS=results), capture_output=True, text=True, check=True)
    assert listed.stdout.count('python train.py') == left


@pytest.mark.parametrize('page', ['README.md', *sorted(f'results/{p.name}' for p in ROOT.glob('results/*.md'))])
def test_paths(page):
    """Every path in back quotes that looks like one of the repository's files is there, and every picture and link, down to the heading."""
    text = (ROOT / page).read_text()
    for path in re.findall(r'`((?:config|assets|tests|prepare|\.ci|results)/[\w./*-]+)`', text):
        assert list(ROOT.glob(path)), path
    for path, heading in re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', text):
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.is_file(), path
        headings = re.findall(r'^#+ (.*)$', there.read_text(), re.M) if heading else []
        assert not heading or heading in [re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in headings], heading


PAGES = ''.join(page.read_text() for page in (ROOT / 'README.md', *sorted(ROOT.glob('results/*.md'))))


@pytest.mark.parametrize('command', sorted(set(re.findall(r'`(?:\w+=\S+ )*(python (?:train|eval|model|data|encoder)\.py [^`]*)`', PAGES))))
def test_commands_in_the_text(command):
    """The commands behind the numbers name configs that exist and settings that are accepted."""
    script, *words = shlex.split(command)[1:]
    if script == 'encoder.py':
        assert all(w.split('=')[0] in ('--encoder', '--bench', '--device') for w in words if w.startswith('-'))
    elif script == 'data.py':
        assert words == ['--help'] or configure(getattr(importlib.import_module(f'prepare.{words[0]}'), 'Config', ImportConfig), words[1:])
    else:
        configure({'train.py': TrainConfig, 'eval.py': EvalConfig, 'model.py': BenchConfig}[script], [str(ROOT / w) if w.startswith('config/') else w for w in words])


@pytest.mark.parametrize('names', sorted(set(re.findall(r'bash config/experiments\.sh ([\w-]+(?: [\w-]+)*)', PAGES))))
def test_experiments_in_the_text(names):
    """The groups and runs that the text names are there; a name that is not is an error that lists those that are."""
    listed = partial(subprocess.run, cwd=ROOT, env=os.environ | dict(LIST='1', SEEDS='99'), capture_output=True, text=True)
    assert listed(['bash', 'config/experiments.sh', *names.split()], check=True).stdout.count('python train.py') >= len(names.split())
    assert 'typo: no such group or run; groups are ' in listed(['bash', 'config/experiments.sh', *names.split(), 'typo']).stderr


def test_requirements():
    """The runtime needs the five packages, pinned, and nothing else."""
    lines = (ROOT / 'requirements.txt').read_text().split()
    assert [line.split('==')[0] for line in lines] == ['torch', 'numpy', 'tiktoken', 'pyarrow', 'pillow'] and all('==' in l for l in lines)
