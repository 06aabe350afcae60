"""Whatever happens to a run: killed, stopped, shared by processes, out of disk, out of numbers; and what the user is then told."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from configurator import locked, write_whole
from conftest import ROOT

TINY = ['--max_steps=30', '--eval_interval=10', '--log_interval=4', '--batch_size=8', '--n_embd=16', '--n_head=2', '--device=cpu', '--inner_steps=2',
        '--max_question_tokens=40']
CLOCK = {'ms', 'examples_per_s', 'train_s', 'wall_s', 'eval_s', 'tokens_per_s', 'peak_memory_gb', 'out_dir', 'dataset', 'cache_dir', 'threads', 'processes'}


@pytest.fixture(scope='module')
def flags(tiny_shapes, tiny_encoder, tmp_path_factory):
    return [*TINY, f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f"--cache_dir={tmp_path_factory.mktemp('cache')}"]


def timeless(value):
    """Without what depends on the clock or on the folder."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in CLOCK}
    return value


def outcome(out_dir):
    """All that a finished run leaves: weights, state, log and results, without the clock."""
    checkpoint = evaluation.read_checkpoint(out_dir)
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
import data, train
from data import ShapesConfig
out, kills, longest, *argv = sys.argv[1:]
train.ShapesConfig, rng, deaths, longest = (lambda: ShapesConfig(n_train=60, n_val=20, n_test=20)), random.Random(1), 0, float(longest)
while True:
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
        print(time.time() - start)
        if deaths < int(kills):  # it was faster than the killer: as if it had never been started
            os.remove(os.path.join(out, 'run', 'ckpt.pt'))
            continue
        sys.exit(os.waitstatus_to_exitcode(status))
'''


def test_killed_at_random_moments(tiny_encoder, tmp_path):
    """A run that is killed at 20 random moments, while data are drawn, pictures encoded, weights trained, checkpoints written or answers judged,
    and started again each time with the same command, ends with the same weights, optimizer, log, metrics and predictions, to the bit."""
    ends, longest = [], 0
    for name, kills in (('whole', 0), ('killed', 20)):
        here = tmp_path / name
        here.mkdir()
        done = python(KILLER, here, kills, longest, *TINY, f'--encoder={tiny_encoder}', '--out_dir=run', cwd=here)
        console = (here / 'console').read_text()
        assert done.returncode == 0, done.stderr + console
        longest = float(done.stdout.split()[0])  # seconds that a run takes when it is left alone
        ends.append(outcome(here / 'run'))
        left = [str(p.relative_to(here)) for p in here.rglob('*.partial')]
        assert not left, left
    assert console.count('going on at step') > 2
    assert_same(*ends)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_stopped(number, flags, tmp_path):
    """SIGTERM and Ctrl-C save the state behind the step that is under way, whatever step that is, and say how to go on; the run then ends as one that
    was never stopped."""
    script = f'''
import os, train
from configurator import run_script
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
    assert evaluation.read_checkpoint(tmp_path / 'a')['run']['step'] == 8
    with pytest.raises(ValueError, match='stopped before its first validation'):
        evaluation.main([f'--out_dir={tmp_path / "a"}', '--device=cpu'])
    second = python(script, *flags, '--out_dir=a', cwd=tmp_path)
    assert second.returncode == 0 and 'going on at step 8' in second.stdout
    third = python(script, *flags, '--out_dir=b', cwd=tmp_path)
    assert third.returncode == 0
    assert_same(outcome(tmp_path / 'a'), outcome(tmp_path / 'b'))


def test_full_disk(flags, tmp_path):
    """A disk that is full is one message, and leaves the last checkpoint as it was, without rubbish beside it."""
    script = '''
import resource, sys, train
from configurator import run_script
checkpoint, rate = train.write_whole, train.learning_rate
def filling(step, settings):
    if step == 15:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    return rate(step, settings)
train.learning_rate = filling
run_script(train.main)
'''
    done = python(script, *flags, '--out_dir=a', cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'File too large: what was there before is untouched; make room' in done.stderr, done.stderr
    assert evaluation.read_checkpoint(tmp_path / 'a')['run']['step'] == 10
    assert {p.name for p in (tmp_path / 'a').iterdir()} == {'ckpt.pt', 'log.jsonl'}


def test_one_run_a_folder(flags, tmp_path):
    """Two runs never write to one folder at the same time; when the first one has ended, however it did, the second may."""
    with locked(tmp_path / 'a'):
        with pytest.raises(ValueError, match='another process is writing there'):
            train.main([*flags, f'--out_dir={tmp_path}/a'])
    holder = subprocess.Popen([sys.executable, '-c', f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom configurator import locked\n"
                               f"with locked({str(tmp_path / 'b')!r}): print('in', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'in\n'
    with pytest.raises(ValueError, match='another process'):
        with locked(tmp_path / 'b'):
            pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / 'b'):
        pass


def test_two_draw_at_once(tmp_path):
    """Two runs that both find no drawn data wait for one another: one draws, the other finds it there, and both get the same."""
    script = '''
import data, train
train.ShapesConfig = lambda: data.ShapesConfig(n_train=60, n_val=20, n_test=20)
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

def torchrun(n, code, *argv, cwd):
    script = cwd / 'script.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\n' + code)
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', str(script), *map(str, argv)], cwd=cwd,
                          capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1'))


GRADIENTS = '''
import torch, train
from configurator import configure
settings, _ = configure(train.TrainConfig, sys.argv[1:])
with train.processes(settings) as device:
    torch.manual_seed(0)
    task = (train.AnswerTask if settings.stage == 'answer' else train.AlignTask)(settings, device, None)
    parameters, out = list(task.model.parameters()), []
    for step in range(6):
        task.model.zero_grad()
        batch = train.my_share(task.batch(step))
        sum(task.losses(task.model, batch).values()).backward()
        train.average_gradients(parameters, False)
        out.append([p.grad.clone() for p in parameters if p.grad is not None])
    if train.evaluation.place()[0] == 0:
        torch.save(out, 'gradients.pt')
'''


@pytest.mark.parametrize('stage', ['answer', 'align'])
def test_gradients_of_two_processes(stage, flags, tmp_path):
    """Two processes give the gradients of one that has the whole batch, to 1e-6, whatever the lengths of answers and however few rows a batch has; the
    contrast of stage align sees the captions of both."""
    more = ['--batch_size=6'] if stage == 'answer' else ['--stage=align', '--encoder_width=32', '--encoder_layers=1', '--encoder_dim=16', '--n_latents=4']
    ends = []
    for n in (1, 2):
        done = torchrun(n, GRADIENTS, *flags, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(tmp_path / 'gradients.pt', weights_only=True))
    for one, two in zip(*ends):
        assert len(one) == len(two) and all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(one, two))


def test_two_processes_train(flags, tmp_path):
    """torchrun trains, shares the evaluation so that each row counts once, prints once, and leaves one run, which one process then goes on with: the batches
    do not depend on how many processes there are."""
    script = 'import train\nfrom configurator import run_script\nrun_script(train.main)\n'
    two = torchrun(2, script, *flags, '--out_dir=two', '--dtype=float32', cwd=tmp_path)
    assert two.returncode == 0 and two.stdout.count('best validation') == 1, two.stderr
    train.main([*flags, f'--out_dir={tmp_path}/one', '--dtype=float32'])
    a, b = outcome(tmp_path / 'one'), outcome(tmp_path / 'two')
    assert len(a[1][2].splitlines()) == len(b[1][2].splitlines()) and a[1][1]['n'] == b[1][1]['n']
    losses = [[e['loss'] for e in events if e['event'] == 'step'] for events in (a[1][0], b[1][0])]
    assert len(losses[0]) == 8 and all(abs(x - y) < 2e-3 for x, y in zip(*losses))

    stop = script.replace('run_script(train', 'import os, signal\nrate = train.learning_rate\ntrain.learning_rate = lambda step, s: (step == 12 and '
                          'int(os.environ["RANK"]) == 1 and os.kill(os.getpid(), signal.SIGTERM), rate(step, s))[1]\nrun_script(train')
    stopped = torchrun(2, stop, *flags, '--out_dir=three', '--dtype=float32', cwd=tmp_path)
    assert stopped.returncode != 0 and 'stopped at step 13 of 30' in stopped.stderr, stopped.stderr
    train.main([*flags, f'--out_dir={tmp_path}/three', '--dtype=float32'])
    assert abs(outcome(tmp_path / 'three')[1][0][-2]['loss'] - losses[0][-1]) < 2e-3


def test_a_dying_process_ends_the_job(flags, tmp_path):
    """When one process fails, the others do not wait for it: the job ends with its message."""
    script = '''
import os, train
from configurator import run_script
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
    losses, at = train.AnswerTask.losses, {}
    rate = train.learning_rate
    monkeypatch.setattr(train, 'learning_rate', lambda step, settings: at.update(step=step) or rate(step, settings))
    monkeypatch.setattr(train.AnswerTask, 'losses', lambda self, model, batch: {
        k: v * (math.nan if at['step'] in steps and torch.is_grad_enabled() else 1) for k, v in losses(self, model, batch).items()})


def test_bad_steps(flags, tmp_path, monkeypatch, capsys):
    """A loss that is not finite stops the run with step, learning rate and samples; the state before it is saved. With --skip_bad_steps such steps are
    left out, said and counted, up to that number."""
    not_a_number(monkeypatch, 5, 6)
    with pytest.raises(FloatingPointError, match=r'step 5: loss nan.*lr .*samples train-\d+.*state before this step is saved.*--skip_bad_steps'):
        train.main([*flags, f'--out_dir={tmp_path}/a'])
    saved = evaluation.read_checkpoint(tmp_path / 'a')
    assert saved['run']['step'] == 5 and all(t.isfinite().all() for t in saved['state']['model'].values())
    with pytest.raises(FloatingPointError, match='step 6'):
        train.main([*flags, f'--out_dir={tmp_path}/a', '--skip_bad_steps=1'])
    train.main([*flags, f'--out_dir={tmp_path}/a', '--skip_bad_steps=2'])
    assert 'left out' in capsys.readouterr().out
    assert json.loads((tmp_path / 'a/metrics.json').read_text())['bad_steps'] == 2
    assert all(t.isfinite().all() for t in evaluation.read_checkpoint(tmp_path / 'a')['state']['model'].values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_dtypes_train(dtype, flags, tmp_path):
    """Every dtype learns; float16 through its scaler, whose first overflows are no bad steps, and whose state is part of the checkpoint."""
    more = [f'--dtype={dtype}', '--deterministic=true']
    train.main([*flags, *more, f'--out_dir={tmp_path}'])
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    losses = [e['loss'] for line in (tmp_path / 'log.jsonl').read_text().splitlines() if (e := json.loads(line))['event'] == 'step']
    assert losses[-1] < losses[0] - .5
    assert bool(evaluation.read_checkpoint(tmp_path)['state']['scaler']) == (dtype == 'float16')


# ----------------------------------------------------------------------------
# safety

def test_flipped_bits(flags, tmp_path):
    """A checkpoint or an encoder with one byte changed is refused, for it has checksums."""
    train.main([*flags, '--max_steps=2', '--eval_interval=2', f'--out_dir={tmp_path}'])
    for path, read in ((tmp_path / 'ckpt.pt', lambda: evaluation.read_checkpoint(tmp_path)),
                       (tmp_path / 'encoder.pt', lambda: train.load_encoder(tmp_path / 'encoder.pt'))):
        if path.name == 'encoder.pt':
            train.save_encoder(train.Encoder(train.EncoderConfig(width=32, n_layer=1)), path)
        read()
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match='damaged.*checksum'):
            read()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    """Of several processes only the first one writes a file."""
    monkeypatch.setenv('RANK', '1')
    write_whole(tmp_path / 'x', lambda f: f.write(b'1'))
    assert not (tmp_path / 'x').exists()
    monkeypatch.setenv('RANK', '0')
    write_whole(tmp_path / 'x', lambda f: f.write(b'0'))
    assert (tmp_path / 'x').read_bytes() == b'0'
