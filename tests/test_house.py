"""The house: a room imports from rooms below it alone, and what a first reader skips can be deleted."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_train import TINY

FLOORS = dict(lab=9, align=8, train=7, eval=5, data=4, model=4, encoder=4, prepare=3, configurator=2, pretrained=2, plumbing=1)
FILES = sorted(p for p in ROOT.rglob('*.py') if p.relative_to(ROOT).parts[0].removesuffix('.py') in FLOORS)


def imports(path):
    """The modules of this repository that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    """A file imports from rooms below its own, or from its own room."""
    room = path.relative_to(ROOT).parts[0].removesuffix('.py')
    for module in imports(path):
        other = module.split('.')[0]
        if other in FLOORS and other != room:
            assert FLOORS[other] < FLOORS[room], f'{path.name} imports {module}'


def test_no_circles():
    """No two files import each other, by whatever way round."""
    names = {'.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): p for p in FILES}
    graph = {name: {m for m in imports(p) if m in names and m != name} for name, p in names.items()}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert not graph, graph


def test_without_align_and_lab(tiny_shapes, tiny_encoder, tmp_path):
    """align/ and lab/ can be deleted and the main job still runs."""
    copy = tmp_path / 'copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', 'out', 'data', 'results', 'align', 'lab', '__pycache__'))
    shutil.copy(ROOT / 'data.py', copy)
    argv = ['train.py', 'config/trm.py', *TINY, f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache', f'--out_dir={tmp_path}/run']
    done = subprocess.run([sys.executable, *argv], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / 'run/metrics.json').is_file(), done.stderr


@pytest.mark.parametrize('path', [p for p in FILES], ids=lambda p: str(p.relative_to(ROOT)))
def test_lambdas_are_sort_keys(path):
    """A lambda is a sort key, or it has a name and is a function."""
    allowed = {id(node.value) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.keyword)}
    tree = ast.parse(path.read_text())
    allowed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == 'key'}
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Lambda) and id(node) not in allowed]


def test_the_width():
    """No line of a page is wider than 110 columns."""
    wide = [f'{p.name}:{k}' for p in FILES for k, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 110]
    assert not wide, wide
