"""Whatever happens to a run: killed, stopped, shared by processes, out of disk, out of numbers; and what the user is then told."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import encoder
import eval as evaluation
import train
from encoder import load_encoder
from model import Decoder
from plumbing import results
from plumbing.console import GOES_ON, run_script
from plumbing.files import locked, write_whole
from plumbing.ranks import processes, rank_and_world
from plumbing.run import FORMAT, Stop, read_checkpoint

TINY = ['--dtype=float32', '--max_steps=30', '--eval_interval=10', '--log_interval=4', '--batch_size=8', '--n_embd=16', '--n_head=2', '--device=cpu', '--inner_steps=2',
        '--max_question_tokens=40']
CLOCK = {'curve', 'since_s', 'ms', 'examples_per_s', 'train_s', 'wall_s', 'eval_s', 'tokens_per_s', 'peak_memory_gb', 'out_dir', 'dataset', 'cache_dir', 'threads', 'processes', 'commit'}


@pytest.fixture(scope='module')
def flags(tiny_shapes, tiny_encoder, tmp_path_factory):
    return [*TINY, f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f"--cache_dir={tmp_path_factory.mktemp('cache')}"]


@pytest.fixture(scope='module')
def whole(flags, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    train.main([*flags, f'--out_dir={out}'])
    return out


def timeless(value):
    """Without what depends on the clock, on the folder or on a commit that somebody made meanwhile."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in CLOCK}
    return value


def outcome(out_dir):
    """All that a finished run leaves: weights, state, log and results, without the clock."""
    checkpoint = read_checkpoint(out_dir)
    tensors = {}

    def collect(prefix, value):
        if isinstance(value, dict):
            for key, v in value.items():
                collect(f'{prefix}/{key}', v)
        elif torch.is_tensor(value):
            tensors[prefix] = value
    collect('state', checkpoint['state'])
    collect('best', checkpoint['run']['best'])
    events = [json.loads(line) for line in (Path(out_dir) / 'log.jsonl').read_text().splitlines()]
    return tensors, ([timeless(e) for e in events if e['event'] != 'start'], timeless(json.loads((Path(out_dir) / 'metrics.json').read_text())),
                     (Path(out_dir) / 'predictions.jsonl').read_text())


def assert_same(a, b):
    assert a[0].keys() == b[0].keys() and all(torch.equal(t, b[0][key]) for key, t in a[0].items())
    assert a[1] == b[1]


def python(code, *argv, **kwargs):
    return subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r})\n' + code, *map(str, argv)], capture_output=True, text=True,
                          timeout=300, **kwargs)


# Starts the same run again and again in a child, forked from a process that has done no more than import, and kills it after a random while.
KILLER = '''
import os, random, signal, sys, time
import train
from prepare.shapes import Config as ShapesConfig
out, kills, longest, *argv = sys.argv[1:]
train.ShapesConfig, rng, deaths, longest = (lambda: ShapesConfig(n_train=60, n_val=20, n_test=20)), random.Random(1), 0, float(longest)
metrics = os.path.join(out, 'run', 'metrics.json')
while True:
    finished = os.path.exists(metrics)  # killed when all was written: it only says so
    start, child = time.time(), os.fork()
    if not child:
        console = open(os.path.join(out, 'console'), 'a')
        os.dup2(console.fileno(), 1), os.dup2(console.fileno(), 2)
        train.main(argv)
        os._exit(0)
    if deaths < int(kills):
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    deaths += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status):
        if status:
            sys.exit(os.waitstatus_to_exitcode(status))
        if not finished:
            longest = time.time() - start  # with the data drawn it is quicker
        print(longest)
        if deaths < int(kills):  # it was faster than the killer: as if it had never been started
            os.remove(os.path.join(out, 'run', 'ckpt.pt'))
            os.remove(metrics)
            continue
        break
'''


def test_killed_at_random_moments(tiny_encoder, whole, tmp_path):
    """A run that is killed at 8 random moments, while data are drawn, pictures encoded, weights trained, checkpoints written or answers judged,
    and started again each time with the same command, ends with the same weights, optimizer, log, metrics and predictions, to the bit."""
    longest = 0
    for kills in (0, 8):
        here = tmp_path / str(kills)
        here.mkdir()
        done = python(KILLER, here, kills, longest, *TINY, f'--encoder={tiny_encoder}', '--out_dir=run', cwd=here)
        console = (here / 'console').read_text()
        assert done.returncode == 0, done.stderr + console
        longest = float(done.stdout.split()[0])  # seconds that a run takes when it is left alone
        left = [str(p.relative_to(here)) for p in here.rglob('*.partial')]
        assert not left, left
        assert_same(outcome(here / 'run'), outcome(whole))
    assert console.count('going on at step') > 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stopped(number, flags, whole, tmp_path):
    """SIGTERM and Ctrl-C save the state behind the step that is under way, whatever step that is, and say how to go on; the run then ends as one that
    was never stopped."""
    script = f'''
import os, train
from plumbing.console import run_script
rate = train.learning_rate
def stopping(step, settings):
    if step == 7 and not os.path.exists('been'):
        open('been', 'w').close()
        os.kill(os.getpid(), {int(number)})
    return rate(step, settings)
train.learning_rate = stopping
run_script(train.main)
'''
    first = python(script, *flags, '--out_dir=a', cwd=tmp_path)
    assert first.returncode == 130 and first.stderr == 'stopped at step 8 of 30, which is saved; the same command goes on from there\n', first.stderr
    assert read_checkpoint(tmp_path / 'a', unfinished=True)['run']['step'] == 8
    with pytest.raises(ValueError, match='stopped before its first validation'):
        evaluation.main([f'--out_dir={tmp_path / "a"}', '--device=cpu'])
    second = python(script, *flags, '--out_dir=a', cwd=tmp_path)
    assert second.returncode == 0 and 'going on at step 8' in second.stdout
    assert_same(outcome(tmp_path / 'a'), outcome(whole))


def test_full_disk(flags, tmp_path):
    """A disk that is full is one message, and leaves the last checkpoint as it was, without rubbish beside it."""
    script = '''
import resource, sys, train
from plumbing.console import run_script
rate = train.learning_rate
def filling(step, settings):
    if step == 15:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    return rate(step, settings)
train.learning_rate = filling
run_script(train.main)
'''
    done = python(script, *flags, '--out_dir=a', cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'ckpt.pt: File too large; make room' in done.stderr, done.stderr
    assert read_checkpoint(tmp_path / 'a')['run']['step'] == 10
    assert {p.name for p in (tmp_path / 'a').iterdir()} == {'ckpt.pt', 'log.jsonl', '.lock'}


def test_one_run_a_folder(flags, tmp_path):
    """Two runs never write to one folder at the same time; when the first one has ended, however it did, the second may."""
    with locked(tmp_path / 'a/.lock'):
        with pytest.raises(ValueError, match='another process is writing there'):
            train.main([*flags, f'--out_dir={tmp_path}/a'])
    holder = subprocess.Popen([sys.executable, '-c', f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom plumbing.files import locked\n"
                               f"with locked({str(tmp_path / 'b/.lock')!r}): print('in', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'in\n'
    with pytest.raises(ValueError, match='another process'):
        with locked(tmp_path / 'b/.lock'):
            pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / 'b/.lock'):
        pass


def test_two_draw_at_once(tmp_path):
    """Two runs that both find no drawn data wait for one another: one draws, the other finds it there, and both get the same."""
    script = '''
import train
train.ShapesConfig = lambda config=train.ShapesConfig: config(n_train=60, n_val=20, n_test=20)
train.draw_if_missing()
'''
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r})\n' + script
    both = [subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert {p.name for p in (tmp_path / 'data/shapes').iterdir()} == {'train.parquet', 'val.parquet', 'test.parquet'}


# ----------------------------------------------------------------------------
# several processes

def torchrun(n, code, *argv, cwd, start=partial(subprocess.run, capture_output=True, timeout=300)):
    script = cwd / 'script.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\n' + code)
    return start([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', str(script), *map(str, argv)], cwd=cwd,
                 text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))


GRADIENTS = '''
import torch, train
from plumbing.ranks import rank_and_world
all_reduce, out = train.all_reduce, []
def caught(parameters, values):
    loss, asked = all_reduce(parameters, torch.stack([values[0], values.new_tensor(rank_and_world()[0] == 1 and len(out) == 5)]))
    assert (asked > 0) == (len(out) == 5 and rank_and_world()[1] > 1)  # all know that one was asked to stop
    out.append([loss.clone()] + [p.grad.clone() for p in parameters if p.grad is not None])
    return torch.stack([loss, torch.zeros(())])
train.all_reduce = caught
train.judge_test_split = lambda *args: None
train.main(sys.argv[1:])
import os
if int(os.environ['RANK']) == 0:
    torch.save(out, 'gradients.pt')
'''


def test_gradients_of_two_processes(flags, tmp_path):
    """Two processes give the gradients of one that has the whole batch, to 1e-6, whatever the lengths of answers and however few rows a batch has."""
    ends = []
    for n in (1, 2):
        done = torchrun(n, GRADIENTS, *flags, '--batch_size=6', '--max_steps=6', '--eval_interval=6', '--learning_rate=1e-30', f'--out_dir={n}', cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(tmp_path / 'gradients.pt', weights_only=True))
    for one, two in zip(*ends):
        assert len(one) == len(two) and all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(one, two))


def test_two_processes_train(flags, whole, tmp_path):
    """torchrun trains, shares the evaluation so that each row counts once, prints once, and leaves one run, which one process then goes on with: the batches
    do not depend on how many processes there are."""
    script = 'import train\nfrom plumbing.console import run_script\nrun_script(train.main)\n'
    two = torchrun(2, script, *flags, '--out_dir=two', cwd=tmp_path)
    assert two.returncode == 0 and two.stdout.count('best validation') == 1, two.stderr
    a, b = outcome(whole), outcome(tmp_path / 'two')
    assert len(a[1][2].splitlines()) == len(b[1][2].splitlines()) and a[1][1]['n'] == b[1][1]['n']
    losses = [[e['loss'] for e in events if e['event'] == 'step'] for events in (a[1][0], b[1][0])]
    assert len(losses[0]) == 8 and all(abs(x - y) < 2e-3 for x, y in zip(*losses))
    validations = [[(e['loss'], e['em']) for e in events if e['event'] == 'eval'] for events in (a[1][0], b[1][0])]  # a row counted twice would show
    assert all(abs(x[0] - y[0]) < 2e-3 and abs(x[1] - y[1]) < .02 for x, y in zip(*validations))

    shutil.copytree(tmp_path / 'two', tmp_path / 'judged')
    judge = torchrun(2, 'import eval\nfrom plumbing.console import run_script\nrun_script(eval.main)\n', '--out_dir=judged', '--device=cpu', cwd=tmp_path)  # it shares the work too
    assert judge.returncode == 0 and judge.stdout.count('written: ') == 1, judge.stderr
    again = json.loads((tmp_path / 'judged/metrics.json').read_text())
    assert again['n'] == b[1][1]['n'] and abs(again['em'] - b[1][1]['em']) < .02

    for step in (10, 20):  # torchrun is killed behind the first and the second checkpoint: its processes end too, and the run goes on to the same bits
        killed = torchrun(2, script, *flags, '--out_dir=killed', cwd=tmp_path, start=partial(subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        while killed.poll() is None and not ((tmp_path / 'killed/ckpt.pt').is_file()
                                             and read_checkpoint(tmp_path / 'killed', unfinished=True)['run']['step'] >= step):
            time.sleep(.05)
        killed.kill()
        killed.wait()
        with locked(tmp_path / 'killed/.lock', wait=True):
            pass
    again = torchrun(2, script, *flags, '--out_dir=killed', cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_same(outcome(tmp_path / 'two'), outcome(tmp_path / 'killed'))

    stop = script.replace('run_script(train', 'import os, signal\nrate = train.learning_rate\ntrain.learning_rate = lambda step, s: (step == 12 and '
                          'int(os.environ["RANK"]) == 1 and os.kill(os.getpid(), signal.SIGTERM), rate(step, s))[1]\nrun_script(train')
    stopped = torchrun(2, stop, *flags, '--out_dir=three', cwd=tmp_path)
    assert stopped.returncode != 0 and 'stopped at step 13 of 30' in stopped.stderr, stopped.stderr
    train.main([*flags, f'--out_dir={tmp_path}/three'])
    assert all(abs(e['loss'] - loss) < 2e-3 for e, loss in zip([e for e in outcome(tmp_path / 'three')[1][0] if e['event'] == 'step'], losses[0]))


def test_in_turn(tmp_path):
    """The first process makes what the others then find; all get what it returns for them; items come from all."""
    script = '''
import train, time
from plumbing.ranks import from_all, in_turn, rank_and_world
settings, _ = train.configure(train.TrainConfig, ['--device=cpu'])
def make():
    made = open('made').read() if rank else ''
    time.sleep(.5 * (rank == 0))
    open('made', 'w').write(made + str(rank))
    return rank
with train.processes(settings):
    rank = rank_and_world()[0]
    assert in_turn(make) == rank and from_all(rank) == [0, 1]
    write_whole('written', lambda f: f.write(str(rank).encode()))
'''
    done = torchrun(2, 'from plumbing.files import write_whole\n' + script, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / 'made').read_text() == '01', done.stderr
    assert (tmp_path / 'written').read_text() == '0'  # of several processes only the first one writes


def test_a_dying_process_ends_the_job(flags, tmp_path):
    """When one process fails, the others do not wait for it: the job ends with its message."""
    script = '''
import os, train
from plumbing.console import run_script
rate = train.learning_rate
def failing(step, settings):
    if step == 3 and os.environ['RANK'] == '1':
        raise ValueError('the second process fails')
    return rate(step, settings)
train.learning_rate = failing
run_script(train.main)
'''
    start = time.time()
    done = torchrun(2, script, *flags, '--out_dir=a', cwd=tmp_path)
    assert done.returncode != 0 and 'error: the second process fails' in done.stderr and time.time() - start < 100


# ----------------------------------------------------------------------------
# numbers that go wrong

def not_a_number(monkeypatch, *steps):
    forward, rate, at = Decoder.forward, train.learning_rate, {}
    monkeypatch.setattr(train, 'learning_rate', lambda step, settings: at.update(step=step) or rate(step, settings))

    def spoilt(*args, **more):
        logits, loss = forward(*args, **more)
        return logits, loss * math.nan if loss is not None and at['step'] in steps and torch.is_grad_enabled() else loss
    monkeypatch.setattr(Decoder, 'forward', spoilt)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_bad_steps(dtype, flags, tmp_path, monkeypatch, capsys):
    """A loss that is not finite stops the run with step, learning rate and samples; the state before it is saved. With --skip_bad_steps such steps are
    left out, said and counted, up to that number."""
    not_a_number(monkeypatch, 5, 6)
    flags = [*flags, f'--dtype={dtype}']
    with pytest.raises(FloatingPointError, match=r'step 5: loss nan.*lr .*samples train-\d+.*state before this step is saved.*--skip_bad_steps'):
        train.main([*flags, f'--out_dir={tmp_path}/a'])
    saved = read_checkpoint(tmp_path / 'a', unfinished=True)
    assert saved['run']['step'] == 5 and all(t.isfinite().all() for t in saved['state']['model'].values())
    with pytest.raises(FloatingPointError, match='step 6'):
        train.main([*flags, f'--out_dir={tmp_path}/a', '--skip_bad_steps=1'])
    train.main([*flags, f'--out_dir={tmp_path}/a', '--skip_bad_steps=2'])
    assert 'left out' in capsys.readouterr().out
    assert json.loads((tmp_path / 'a/metrics.json').read_text())['bad_steps'] == 2
    assert all(t.isfinite().all() for t in read_checkpoint(tmp_path / 'a')['state']['model'].values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_dtypes_train(dtype, flags, tmp_path):
    """Every dtype learns; float16 through its scaler, whose first overflows are no bad steps, and whose state is part of the checkpoint."""
    more = [f'--dtype={dtype}', '--deterministic=true', '--max_steps=40']
    train.main([*flags, *more, f'--out_dir={tmp_path}'])
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    losses = [e['loss'] for line in (tmp_path / 'log.jsonl').read_text().splitlines() if (e := json.loads(line))['event'] == 'step']
    assert losses[-1] < losses[0] - .5
    assert bool(read_checkpoint(tmp_path)['state']['scaler']) == (dtype == 'float16')


# ----------------------------------------------------------------------------
# safety

def test_flipped_bits(flags, tmp_path):
    """A checkpoint or an encoder with one byte changed is refused, for it has checksums."""
    train.main([*flags, '--max_steps=2', '--eval_interval=2', f'--out_dir={tmp_path}'])
    for path, read in ((tmp_path / 'ckpt.pt', lambda: read_checkpoint(tmp_path)),
                       (tmp_path / 'encoder.pt', lambda: load_encoder(tmp_path / 'encoder.pt'))):
        if path.name == 'encoder.pt':
            encoder.save_encoder(encoder.Encoder(encoder.EncoderConfig(width=32, n_layer=1)), path)
        read()
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match='damaged.*checksum'):
            read()


def test_variables_left_in_the_environment(tmp_path, monkeypatch, capsys):
    """Who works alone writes, whatever another program left in the environment; which process this is only the process group says (test_in_turn)."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    write_whole(tmp_path / 'x', lambda f: f.write(b'1'))
    assert (tmp_path / 'x').exists()
    with processes(types.SimpleNamespace(device='cpu')) as device:
        assert device == 'cpu' and rank_and_world() == (0, 1)
    assert 'WORLD_SIZE=2 in the environment without LOCAL_RANK, MASTER_ADDR, MASTER_PORT' in capsys.readouterr().out
    monkeypatch.setenv('MASTER_ADDR', 'localhost')
    for name, value, message in (('MASTER_PORT', 'http', "MASTER_PORT='http'"), ('LOCAL_RANK', '', "LOCAL_RANK=''"), ('RANK', '2', 'RANK=2 .*expected less than WORLD_SIZE=2'),
                                 ('RANK', '-1', "RANK='-1'"), ('WORLD_SIZE', '', "WORLD_SIZE='' in the environment: expected a number"), ('WORLD_SIZE', 'two', "WORLD_SIZE='two'")):
        for key in ('LOCAL_RANK', 'RANK', 'MASTER_PORT'):
            monkeypatch.setenv(key, '1')
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=message), processes(types.SimpleNamespace(device='cpu')):
            pass


# ----------------------------------------------------------------------------
# messages

MISTAKES = [  # script, arguments, what its message says; {run}: a finished run, {plain}: one of a plain decoder, {here}: a folder for rubbish
    (train, '--n_layers=3', 'n_layers: no such setting .did you mean n_layer'),
    (train, '--batch_size 8', 'a flag is written --key=value.*did you mean --batch_size=8'),
    (train, '--lr 8', 'did you mean learning_rate'),
    (train, '--out_dir=', 'out_dir is empty'),
    (train, '--out_dir={here}/typo.py/x', '--out_dir: .*x: Not a directory; expected a folder'),
    (train, '--dataset={data} --encoder={encoder} --cache_dir={here}/typo.py', '--cache_dir: .*typo.py: File exists; expected a folder'),
    (train, '--out_dir={here}/{long}', '--out_dir: .*[.]{3}.*: File name too long'),
    (train, '--dataset={long}', '--dataset: aaa.*[.]{3}.*: File name too long'),
    (train, '{here}/nul.py', 'out_dir=.*without null characters'),
    (train, '--out_dir={here}/out --dataset={here}/pointer', 'train.parquet: it is a pointer of Git LFS.*git lfs pull'),
    (train, '--dataset={data} --encoder={here}/pointer/train.parquet', 'train.parquet: it is a pointer of Git LFS.*git lfs pull'),
    (train, '--dataset={data} --encoder={here}/page.safetensors', 'page.safetensors: it is a web page'),
    (encoder, '{here}/pointer/train.parquet', 'train.parquet: not a picture: it is a pointer of Git LFS'),
    (evaluation, '--out_dir={run} --encoder={here}/none.pt', 'none.pt: no such encoder'),
    (evaluation, '--out_dir={run} --encoder=assets/encoder_shapes.pt', 'not the encoder that this run was trained with.*--encoder=PATH'),
    (train, 'batch_size=8', 'did you mean --batch_size=8'),
    (train, 'config/trn.py', 'config/trn.py: no such config file.*config/'),
    (train, '{here}/typo.py', 'typo.py: n_layr: no such setting .did you mean n_layer'),
    (train, '{here}/syntax.py', 'syntax.py, line 2: not Python'),
    (train, '{encoder}', 'not Python'),
    (train, '{here}/torn', 'torn, line 1: not Python'),
    (train, '--batch_size=32.5', 'batch_size=32.5: expected a whole number'),
    (train, '--use_vision=maybe', 'use_vision=maybe: expected true or false'),
    (train, '--learning_rate=-1', 'learning_rate=-1.0: expected more than 0'),
    (train, '--kind=trn --dataset={data} --encoder={encoder}', 'kind=trn: expected one of plain, trm'),
    (train, '--n_embd=30 --dataset={here}/none', 'n_embd=30: expected a multiple of'),  # said before anything is read
    (train, '--grad_clip=-1', 'grad_clip=-1.0.*expected 0 or more'),
    (train, '--min_lr_ratio=2', 'min_lr_ratio=2.0: expected between 0 and 1'),
    (train, '--vocab_size=100', 'vocab_size=100: expected at least 259'),
    (train, '--seed=-1', 'seed=-1: expected 0 to'),
    (train, '{here}/false.py', 'false.py, line 1: NameError'),
    (train, '--dataset={here}/none', 'train.parquet: no such file; a dataset is a folder with'),
    (train, '--dataset={here}/text', 'train.parquet: not a parquet file'),
    (train, '--dataset={here}/columns', 'has no column image or sound; it has picture'),
    (train, '--dataset={here}/no_rows', 'train.parquet: has no rows; training, validation and test need some each'),
    (train, '--dataset={here}/no_test', 'val.parquet: no such file'),
    (train, '--out_dir={run} --fresh=true --dataset={here}/none', 'no such file; a dataset is a folder with'),
    (train, '--dataset={data} --encoder=none.pt', 'none.pt: no such encoder'),
    (train, '--dataset={data} --encoder={here}/typo.py', 'typo.py: not a file that can be read safely'),
    (train, '--dataset={data} --encoder={encoder} --vision_dim=7', r'vision_dim=7: expected one of the prefixes'),
    (train, '--dataset={data} --encoder={encoder} --max_question_tokens=2', 'tokens, more than max_question_tokens=2.*--truncate=true'),
    (train, '--device=cuda:9', 'device=cuda:9: not to be had here'),
    (train, '--out_dir={here}/typo.py', 'typo.py: File exists'),
    (train, '--out_dir={run} --seed=3', 'holds a run with other settings.*seed=1337 there, 3 here.*--fresh=true'),
    (evaluation, '--out_dir={here}/none', 'no such file; a run writes it: python train.py'),
    (evaluation, '--out_dir={here}/evil', 'not a file that can be read safely'),
    (evaluation, '--out_dir={run} --batch_size=0', 'batch_size=0: expected at least 1'),
    (evaluation, '--out_dir={run} --temperature=-1', 'temperature=-1.0: expected at least 0'),
    (evaluation, '--out_dir={run} --split=tset', 'split=tset: expected train, val or test'),
    (evaluation, '--out_dir={run} --image={here}/none.png --question=what?', 'none.png: no such file'),
    (evaluation, '--out_dir={run} --image={here}/typo.py --question=what?', 'typo.py: not a picture'),
    (evaluation, '--out_dir={run} --question=what?', '--question: about what'),
    (evaluation, '--out_dir={run} --top_k=3', '--top_k goes with a --temperature above 0'),
    (data, 'coco --source=x --out=y', 'coco: no such format; there are captions, clevr'),
    (data, 'vqav2 --source={here}/none --out={here}/x', 'no such file; --source is the folder of the published files'),
    (data, 'shapes --out={data}', 'already there; delete it or choose another --out'),
    (data, 'shapes --out={here}/typo.py/x', 'typo.py: already there, a file; --out=.*/x is to be a new folder'),
    (data, 'shapes --out=/proc/none/x', '--out: /proc/none: No such file'),
    (data, 'shapes --max_hops=99', 'max_hops=99'),
    (data, 'shapes --n_val=-1', 'n_val=-1'),
    (data, 'sortofclevr --n_test=-1', 'n_test=-1'),
    (data, 'pixmo --source=x --out=y --retries=-1', 'retries=-1: expected 0 or more'),
    (encoder, '{here}/typo.py --device=cuda:9', 'device=cuda:9: not to be had here'),
    (encoder, '{here}/typo.py', 'typo.py: not a picture'),
]


@pytest.fixture(scope='module')
def rubbish(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq
    here = tmp_path_factory.mktemp('rubbish')
    for name, text in {'typo.py': 'n_layr = 3\n', 'syntax.py': 'n_layer = 3\nn_head = = 2\n', 'false.py': 'use_vision = false\n', 'torn.json': '', 'torn': 'out_dir = "\ud800"', 'text/train.parquet': 'words', 'nul.py': 'out_dir = "a\\0b"\n',
                       'page.safetensors': '\n<!DOCTYPE html>\n<html>', 'pointer/train.parquet': 'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n'}.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text, errors='surrogatepass')
    for name in ('columns', 'evil', 'no_rows', 'no_test'):
        (here / name).mkdir()
    table = pa.table(dict(picture=[b'1'], question=['q'], answer=['a']))
    pq.write_table(table, here / 'columns/train.parquet')
    pq.write_table(table.rename_columns(['image', 'question', 'answer'])[:0], here / 'no_rows/train.parquet')
    pq.write_table(table.rename_columns(['image', 'question', 'answer']), here / 'no_test/train.parquet')
    torch.save(dict(format=FORMAT, evil=print), here / 'evil/ckpt.pt')
    return here


@pytest.mark.parametrize('script, argv, message', MISTAKES, ids=[argv for _, argv, _ in MISTAKES])
def test_mistakes(script, argv, message, rubbish, whole, tiny_shapes, tiny_encoder, monkeypatch, capsys):
    """A mistake that a new user may make ends a script with one line that says what was wrong and what to do, without a stack trace and with exit code 1;
    --debug adds the trace."""
    places = dict(here=rubbish, run=whole, data=tiny_shapes, encoder=tiny_encoder, long='a' * 5000)
    words = [word.format(**places) for word in argv.split()]
    words += [f'--out_dir={rubbish}/out'] * (script is train and '--out_dir' not in argv)
    monkeypatch.setattr(sys, 'argv', ['script', *words])
    with pytest.raises(SystemExit) as end:
        run_script(script.main)
    text = capsys.readouterr().err
    assert end.value.code == 1 and text.startswith('error: ') and text.count('\n') == 1 and re.search(message, text), text
    sys.argv.append('--debug')
    with pytest.raises((ValueError, OSError)):
        run_script(script.main)


def test_control_characters(rubbish, monkeypatch, capsys):
    """What a data set or a file name says reaches the terminal without its control characters."""
    monkeypatch.setattr(sys, 'argv', ['train.py', '--dataset=a\x1b[2Jb', f'--out_dir={rubbish}/out'])
    with pytest.raises(SystemExit):
        run_script(train.main)
    assert '\x1b' not in capsys.readouterr().err
    metrics = dict(n=1, em=1., f1=1., em_types=1., by_type={'\x1b[31m': dict(n=1, em=1., f1=1.)})
    assert '\x1b' not in results.result_table(metrics)


# ----------------------------------------------------------------------------
# what is printed, and pictures, never end a run

def test_a_console_that_is_gone(flags, tmp_path, monkeypatch):
    """What is printed ends no script: its reader has gone, its file is closed or full or knows no such letters; `--help | head -1` ends quietly. A run ends as any
    other."""
    script = tmp_path / 'script.py'
    script.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from plumbing.console import progress, run_script
def main(argv):
    for i in range(2000):
        print('\u65e5\\udc80', i, flush=i % 7 == 0)
    progress('reading', 1, 1, time.time())
    print('written', file=done)
done = open('done', 'a')
read, write = os.pipe()
os.close(read)
closed = open(os.devnull, 'w')
closed.close()
for console in (open(write, 'w'), open('/dev/full', 'w'), closed, None, open('narrow', 'w', encoding='ascii')):
    sys.stdout = sys.stderr = console
    run_script(main)
""")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and (tmp_path / 'done').read_text().count('written') == 5, done.stderr
    assert '?? 1999\n' in (tmp_path / 'narrow').read_text()
    done = subprocess.run(f'{sys.executable} {ROOT}/train.py --help | head -1', shell=True, capture_output=True, text=True)
    assert done.stdout.startswith('usage: ') and not done.stderr
    closed = open(tmp_path / 'narrow')
    closed.close()
    monkeypatch.setattr(sys, 'stdout', closed)
    monkeypatch.setattr(sys, 'argv', ['train.py', *flags, '--max_steps=2', '--eval_interval=2', f'--out_dir={tmp_path}/\u65e5$_'])
    run_script(train.main)
    assert (tmp_path / '\u65e5$_/metrics.json').is_file() and (tmp_path / '\u65e5$_/curves.png').is_file()


def test_a_closed_terminal():
    """The SIGHUP of a terminal that is closed is taken as SIGTERM, but where nohup asked to ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may be ignoring it
    with Stop() as stop:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stop() as stop:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
    signal.signal(signal.SIGHUP, before)


def test_promises(monkeypatch, capsys):
    """Only who does go on says so, of Ctrl-C and of a full disk."""
    def interrupted(argv):
        raise KeyboardInterrupt

    def full(argv):
        raise OSError(errno.ENOSPC, 'No space left on device', 'x')

    monkeypatch.setattr(sys, 'argv', ['script'])
    for main in (interrupted, full):
        for promise in ('', GOES_ON):
            with pytest.raises(SystemExit):
                run_script(main, promise)
            assert ('goes on from there' in capsys.readouterr().err) == bool(promise)


def test_a_picture_costs_nothing(whole, tmp_path, monkeypatch, capsys):
    """Where a picture cannot be drawn, one line says so and the results are there; they lie on disk before pictures are tried. Names with $, _ and backslashes are
    drawn as they stand."""
    out = tmp_path / r'\a$b_c\d$e'
    shutil.copytree(whole, out)
    before = json.loads((out / 'metrics.json').read_text())
    (out / 'metrics.json').unlink()
    (out / 'curves.png').unlink()

    def failing(path, rows, predictions):
        assert (out / 'predictions.jsonl').is_file() and json.loads((out / 'metrics.unfinished.json').read_text()) == before
        raise LookupError('no glyph')

    monkeypatch.setattr(results, 'draw_samples', failing)
    predictions = [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]
    results.write_results(out, before, None, predictions)
    assert 'samples.png: not drawn (LookupError: no glyph)' in capsys.readouterr().out
    assert json.loads((out / 'metrics.json').read_text()) == before and not (out / 'metrics.unfinished.json').exists()
    assert (out / 'curves.png').is_file()


# ----------------------------------------------------------------------------
# where things lie is not what they are

def test_moved(flags, whole, tiny_shapes, tiny_encoder, tmp_path, capsys, monkeypatch):
    """A data set and an encoder that lie elsewhere now are the ones of the run: its command, which then says that the run is finished, and eval.py, which writes its results,
    take them; other content is refused, with advice that keeps the run."""
    shutil.copytree(whole, tmp_path / 'run')
    shutil.copytree(tiny_shapes, tmp_path / 'moved')
    shutil.copy(tiny_encoder, tmp_path / 'e.pt')
    monkeypatch.chdir(tmp_path)
    moved = ['--dataset=./moved/', '--encoder=e.pt']
    train.main([*flags, *moved, '--out_dir=run/'])
    said = capsys.readouterr().out
    assert 'run/: finished at step 30' in said and 'mean of types' in said and 'evaluating' not in said
    evaluation.main(['--out_dir=run', '--device=cpu', *moved])
    assert 'written: run/metrics.json' in capsys.readouterr().out
    with pytest.raises(ValueError, match='encoder=.*not the one .*choose another --out_dir, or .*--fresh=true, which deletes'):
        train.main([*flags, '--out_dir=run', f'--encoder={ROOT}/assets/encoder_shapes.pt'])
