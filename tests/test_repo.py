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
from align.config import AlignConfig
from configurator import configure
from eval import EvalConfig
from lab.bench import BenchConfig
from prepare import ImportConfig
from prepare.shapes import Config as ShapesConfig
from train import TrainConfig

README = (ROOT / 'README.md').read_text()
DOCS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md')), *sorted(ROOT.glob('results/*.md'))]
PAGES = ''.join(page.read_text() for page in DOCS)
COMMANDS = [line.strip() for block in re.findall(r'```(?:sh|bash)\n(.*?)```', PAGES, re.S)
            for line in block.splitlines() if line.strip() and not line.lstrip().startswith('#')]


def test_top_level_files():
    """One file per concept, and no other Python file at the top."""
    assert {p.name for p in ROOT.glob('*.py')} == {'model.py', 'data.py', 'train.py', 'eval.py', 'encoder.py', 'configurator.py'}


@pytest.mark.parametrize('config', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_configs_load(config):
    """Every config is valid, opens with its purpose and writes to a folder of its own, named after it."""
    settings, _ = configure(AlignConfig if config.startswith('align') else TrainConfig, [str(ROOT / 'config' / config)])
    assert (ROOT / 'config' / config).read_text().startswith('# ')
    assert settings.out_dir == f'out/{config.removesuffix(".py")}'


def test_pixmo_configs_agree():
    """The baseline at full size differs from its TRM in the decoder alone."""
    trm, plain = (configure(TrainConfig, [str(ROOT / f'config/{name}_pixmo.py')])[0] for name in ('trm', 'plain'))
    assert {f.name for f in fields(trm) if getattr(trm, f.name) != getattr(plain, f.name)} == {'out_dir', 'kind', 'n_layer'}


def settings_of(module):
    """The one class of settings that a program of lab or align has."""
    found = [value for name, value in vars(importlib.import_module(module)).items() if name.endswith('Config') and name != 'ModelConfig'
             and getattr(value, '__module__', '') in (module, 'align.config')]
    found = [value for value in found if value.__module__ == module] or found
    assert len(found) == 1, (module, found)
    return found[0]


def accepted(words):
    """Checks that a command, as words, names files that exist and settings that are accepted."""
    full = [str(ROOT / w) if re.match(r'config/\S+\.py$', w) else w for w in words]
    if words[0] == 'torchrun':
        k = next(k for k, w in enumerate(words) if w in ('train.py', '-m'))
        return accepted(['python', *words[k:]])
    if words[0] == 'bash':
        assert (ROOT / words[1]).is_file(), words
    elif words[:3] == ['pip', 'install', '-r'] or words[:2] == ['pip', 'install']:
        assert '-r' not in words or (ROOT / words[words.index('-r') + 1]).is_file()
    elif words[:2] == ['python', 'train.py']:
        '--help' in words or configure(TrainConfig, full[2:])
    elif words[:2] == ['python', 'eval.py']:
        '--help' in words or configure(EvalConfig, words[2:])
    elif words[:3] == ['python', '-m', 'align']:
        '--help' in words or configure(AlignConfig, full[3:])
    elif words[:3] == ['python', '-m', 'pytest']:
        assert all((ROOT / w).exists() for w in words[3:] if w.startswith('tests/'))
    elif words[:2] == ['python', '-m']:
        flags = [w for w in words[3:] if w.startswith('--') or w.startswith('config/')]
        '--help' in words or configure(settings_of({'align': 'align.config'}.get(words[2], words[2])), flags)
    elif words[:2] == ['python', 'data.py']:
        words[2:] in ([], ['--help']) or configure(getattr(importlib.import_module(f'prepare.{words[2]}'), 'Config', ImportConfig), words[3:])
    elif words[0] == 'python' and words[1].endswith('.py'):
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ('cp', 'git', 'cd', 'ruff'), words


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_of_the_pages(command):
    """Every command of README, docs and results names files that exist and settings that are accepted."""
    for part in re.split(r'&&|\|', command.split(' #')[0]):
        words = shlex.split(part)
        while words and re.match(r'[A-Z_]+=', words[0]):
            words = words[1:]
        if any(w in ('NAME', 'FORMAT', '...') or 'NAME' in w.split('=')[-1] for w in words):
            continue  # a pattern to fill in
        accepted(words)


@pytest.mark.parametrize('config', [TrainConfig, AlignConfig, EvalConfig, ShapesConfig, ImportConfig])
def test_every_setting_is_tested(config):
    """No setting that neither a test uses nor a config; those of training and evaluation are given as a flag or set by a config."""
    used = '\n'.join(path.read_text() for path in (*ROOT.glob('tests/test_*.py'), *ROOT.glob('config/*.py')))
    how = '--{0}=|^{0} = ' if config in (TrainConfig, AlignConfig, EvalConfig) else r'\b{0} ?='
    assert [f.name for f in fields(config) if not re.search(how.format(f.name), used, re.M)] == []


def test_gpu_script():
    """The parts of lab/gpu.sh take nine minutes at most, and every flag in it is one of its program's."""
    listed = subprocess.run(['bash', 'lab/gpu.sh'], env=os.environ | dict(LIST='1'), cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(int(line.split()[1]) for line in listed) <= 540 and len(listed) == 9
    parsed = 0
    for line in listed:
        for program, settings in (('train.py', TrainConfig), ('lab.bench', BenchConfig)):
            if program in line:
                configure(settings, line.split(program)[1].split())
                parsed += 1
    assert parsed == 6


def test_pixmo_timing(tmp_path, monkeypatch):
    """lab/pixmo_timing.sh makes pictures and an encoder that config/trm_pixmo.py takes; here of another size than the true one."""
    made = re.search(r"<<'DRAW'\n(.*?)\nDRAW\n", (ROOT / 'lab/pixmo_timing.sh').read_text(), re.S).group(1)
    monkeypatch.setattr(encoder, 'EDGE_GLASS_CONFIG', encoder.EncoderConfig(width=32, n_layer=1, n_latents=4, vision_dim=512, prefixes=(512,)))
    monkeypatch.setattr(sys, 'argv', ['-', '40', str(tmp_path)])
    exec(compile(made, 'pixmo_timing.sh', 'exec'), {})
    train.main([str(ROOT / 'config/trm_pixmo.py'), f'--dataset={tmp_path}/data', f'--encoder={tmp_path}/encoder.pt', '--tokenizer=bpe', f'--cache_dir={tmp_path}/cache',
                f'--out_dir={tmp_path}/run', '--max_steps=1', '--eval_interval=1', '--batch_size=4', '--n_embd=32', '--n_head=2', '--device=cpu'])
    assert (tmp_path / 'run/metrics.json').is_file()


@pytest.mark.parametrize('groups, least', [([], 40), (['gpu'], 10), (['T2', 'width'], 5)])
def test_experiments(groups, least):
    """Every run of lab/experiments.sh, whether it is done or not, has settings that are accepted."""
    listed = subprocess.run(['bash', 'lab/experiments.sh', *groups], cwd=ROOT, env=os.environ | dict(LIST='1', SEEDS='99'), capture_output=True, text=True, check=True)
    names, commands = set(), [line.split() for line in listed.stdout.splitlines()[1:]]
    for python, script, *argv in commands:
        settings, _ = configure(TrainConfig, [str(ROOT / a) if a.startswith('config/') else a for a in argv])
        names.add(settings.out_dir)
    assert len(names) == len(commands) >= least


@pytest.mark.parametrize('results, left', [('', 0), ('out/again', 1)])
def test_experiments_again(results, left):
    """A run whose result is in results/runs is not made again, unless its result is to lie elsewhere."""
    listed = subprocess.run(['bash', 'lab/experiments.sh', 'trm'], cwd=ROOT, env=os.environ | dict(LIST='1', SEEDS='1', RESULTS=results), capture_output=True, text=True, check=True)
    assert listed.stdout.count('python train.py') == left


@pytest.mark.parametrize('page', [str(page.relative_to(ROOT)) for page in DOCS])
def test_paths(page):
    """Every path in back quotes that looks like one of the repository's files is there, and every picture and link, down to the heading."""
    text = (ROOT / page).read_text()
    for path in re.findall(r'`((?:config|assets|tests|prepare|lab|align|docs|plumbing|pretrained|\.ci|results)/[\w./*-]+)`', text):
        assert list(ROOT.glob(path)), path
    for path, heading in re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', text):
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.is_file(), path
        headings = re.findall(r'^#+ (.*)$', there.read_text(), re.M) if heading else []
        assert not heading or heading in [re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in headings], heading


@pytest.mark.parametrize('command', sorted(set(re.findall(r'`(?:\w+=\S+ )*(python (?:-m (?:align|lab)\S*|(?:train|eval|data)\.py) [^`]*)`', PAGES))))
def test_commands_in_the_text(command):
    """The commands behind the numbers name configs that exist and settings that are accepted."""
    if not re.search(r'NAME|FORMAT|\.\.\.|--recursion=swap', command):  # a pattern to fill in, or after the README's edit alone
        accepted(shlex.split(command))


@pytest.mark.parametrize('names', sorted(set(re.findall(r'bash lab/experiments\.sh ([\w-]+(?: [\w-]+)*)', PAGES))))
def test_experiments_in_the_text(names):
    """The groups and runs that the text names are there; a name that is not is an error that lists those that are."""
    listed = partial(subprocess.run, cwd=ROOT, env=os.environ | dict(LIST='1', SEEDS='99'), capture_output=True, text=True)
    assert listed(['bash', 'lab/experiments.sh', *names.split()], check=True).stdout.count('python train.py') >= len(names.split())
    assert 'typo: no such group or run; groups are ' in listed(['bash', 'lab/experiments.sh', *names.split(), 'typo']).stderr


def test_requirements():
    """The runtime needs the five packages, pinned, and nothing else."""
    lines = (ROOT / 'requirements.txt').read_text().split()
    assert [line.split('==')[0] for line in lines] == ['torch', 'numpy', 'tiktoken', 'pyarrow', 'pillow'] and all('==' in l for l in lines)


def test_lengths():
    """The README sells the idea in 1,100 words; a page of results has 600, the list of hypotheses 1,300."""
    assert len(README.split()) <= 1100
    for page in ROOT.glob('results/*.md'):
        assert len(page.read_text().split()) <= (1300 if page.name == 'hypotheses.md' else 600), page.name


def test_the_readme_edit(tmp_path):
    """The edit of model.py that the README shows applies, and the decoder that it makes learns and writes."""
    diff = re.search(r'```diff\n(.*?)```', README, re.S).group(1)
    (tmp_path / 'edit.diff').write_text(diff)
    for name in ('model.py', 'configurator.py'):
        (tmp_path / name).write_text((ROOT / name).read_text())
    subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
    applied = subprocess.run(['git', 'apply', '--unidiff-zero', 'edit.diff'], cwd=tmp_path, capture_output=True, text=True)
    assert applied.returncode == 0, f"the README's edit does not fit model.py any more: redo it there: {applied.stderr}"
    assert max(map(len, (tmp_path / 'model.py').read_text().splitlines())) <= 110
    name = re.search(r"^\+.*== '(\w+)':", diff, re.M).group(1)
    script = f"""
import torch, model
assert {name!r} in model.RECURSIONS
decoder = model.build_model(model.ModelConfig(recursion={name!r}, n_embd=16, n_head=2, vision_dim=4))
vision, question, answer = torch.randn(2, 3, 4), torch.randint(3, 9, (2, 5)), torch.tensor([[1, 7, 5], [1, 4, 9]])
logits, loss = decoder(vision, question, answer, answer.roll(-1, 1))
loss.backward()
assert decoder.z_start.grad.abs().max() > 0
written = decoder.generate(vision, question, 3)
assert torch.equal(written[:, 0], decoder(vision, question, answer[:, :1])[0][:, 0].argmax(-1))
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=f'{tmp_path}:{ROOT}'))
    assert done.returncode == 0, done.stderr
