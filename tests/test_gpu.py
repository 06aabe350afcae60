"""What only a GPU can show; skipped where there is none. The other tests ask for the CPU, whose bits repeat."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import train
from data import read_rows
from encoder import load_encoder
from lab import bench
from model import RECURSIONS, ModelConfig, build_model
from plumbing.features import cached_features
from plumbing.graphs import writer_of
from plumbing.run import read_checkpoint, read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
SMALL = ['--max_steps=40', '--eval_interval=20', '--log_interval=10', '--batch_size=32', '--n_embd=32', '--n_head=2', '--inner_steps=2', '--max_question_tokens=40']


@pytest.fixture(scope='module')
def flags(tiny_shapes, tiny_encoder, tmp_path_factory):
    return [*SMALL, f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f"--cache_dir={tmp_path_factory.mktemp('cache')}"]


def losses(out_dir):
    return [event['loss'] for event in read_log(out_dir) if event['event'] == 'step']


@pytest.mark.parametrize('dtype, more', [('float32', []), ('bfloat16', []), ('float16', []), ('bfloat16', ['--train_encoder=true', '--encoder_lr=0.1']),
                                         ('bfloat16', ['--kind=plain']), ('bfloat16', ['--checkpoint_recursion=true'])])
def test_trains_on_the_gpu(dtype, more, flags, tmp_path):
    """A GPU is taken where there is one, in every dtype; the loss is that of the CPU, but for rounding."""
    common = [*flags, *more]
    train.main([*common, f'--dtype={dtype}', f"--out_dir={tmp_path / 'gpu'}"])
    train.main([*common, '--dtype=float32', '--device=cpu', f"--out_dir={tmp_path / 'cpu'}"])
    metrics = json.loads((tmp_path / 'gpu/metrics.json').read_text())
    assert metrics['device'] == torch.cuda.get_device_name() and 0 < metrics['peak_memory_gb'] < 8
    assert losses(tmp_path / 'gpu') == pytest.approx(losses(tmp_path / 'cpu'), abs=.15 if dtype != 'float32' else .05)
    evaluation.main([f"--out_dir={tmp_path / 'gpu'}"])


@pytest.mark.parametrize('more', [['--min_inner_steps=1'], ['--optimizer=adamw', '--grad_accum=2', '--train_encoder=true'],
                                  ['--recursion=add', '--ema=0', '--cache=false', '--checkpoint_recursion=true']], ids=' '.join)
def test_graphs_change_nothing(more, flags, tmp_path, capsys):
    """Steps that are launched as CUDA graphs learn what the same steps learn one kernel at a time."""
    for graphs in ('true', 'false'):
        train.main([*flags, *more, '--dtype=float32', f'--graphs={graphs}', f'--out_dir={tmp_path / graphs}'])
    a, b = (read_checkpoint(tmp_path / graphs)['state']['model'] for graphs in ('true', 'false'))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-2, atol=1e-3)
    assert losses(tmp_path / 'true') == pytest.approx(losses(tmp_path / 'false'), abs=1e-3)


@torch.no_grad()
def test_answers_as_graphs():
    """Tokens that CUDA graphs write are those that kernels write one by one."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=40, n_embd=64, n_head=4, vision_dim=8)).cuda().eval()
    torch.nn.init.normal_(decoder.embed.weight)
    writer = writer_of(decoder, 'cuda')
    for k in (0, 1, 0, 1, 2, 3, 4, 5, 0, 1):  # four shapes are kept, the others go
        vision, question = torch.randn(16, 4, 8, device='cuda'), torch.randint(3, 40, (16, 5 + k), device='cuda')
        for n in (12, 1):
            assert torch.equal(decoder.generate(vision, question, n, writer=writer), decoder.generate(vision, question, n))


def test_deterministic_and_killed(flags, tmp_path):
    """With deterministic=true a run that is killed after its first checkpoint ends with the bits of one that is left alone."""
    command = lambda name: [sys.executable, str(ROOT / 'train.py'), *flags, '--deterministic=true', f'--out_dir={tmp_path / name}']
    subprocess.run(command('whole'), check=True)
    killed, start = subprocess.Popen(command('killed')), time.time()
    while not (tmp_path / 'killed/ckpt.pt').exists() and time.time() - start < 300:
        time.sleep(.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / 'killed/metrics.json').exists()
    subprocess.run(command('killed'), check=True)
    a, b = (read_checkpoint(tmp_path / name)['state'] for name in ('whole', 'killed'))
    for part in ('model', 'ema'):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


@pytest.mark.parametrize('settings', [dict(kind='plain', n_layer=4), *(dict(recursion=name) for name in RECURSIONS)], ids=str)
def test_same_numbers_as_the_cpu(settings):
    """Logits, loss, gradient and written answers of a decoder in float32 are those of the CPU."""
    b = bench.BenchConfig(device='cpu', n_embd=64, n_head=2, vocab_size=200, vision_dim=32, n_answer=6, batch_size=4, inner_steps=3)
    decoder, batch = bench.bench_decoder(b, **settings)
    results = []
    for device in ('cpu', 'cuda'):
        decoder.to(device)
        decoder.zero_grad()
        vision, question, answer, targets = (t.to(device) for t in batch)
        logits, loss = decoder(vision, question, answer, targets)
        loss.backward()
        written = decoder.generate(vision, question, 6)
        results.append((logits.detach().cpu(), loss.item(), decoder.embed.weight.grad.cpu().clone(), written.cpu()))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_encoder(tiny_shapes, tmp_path):
    """A GPU encodes in bfloat16, into a cache of its own; the tokens are those of the CPU to a few percent of their size."""
    encoder, pictures = load_encoder(ROOT / 'assets/encoder_shapes.pt'), read_rows(tiny_shapes, 'val').pictures
    cpu = cached_features(encoder, pictures, tmp_path)[torch.arange(20)].float()
    gpu = cached_features(encoder.to('cuda'), pictures, tmp_path, 'cuda')[torch.arange(20)].float()
    assert 0 < (gpu - cpu).norm() / cpu.norm() < .03


def test_no_such_gpu(tmp_path):
    with pytest.raises(ValueError, match='device=cuda:99: not to be had here'):
        train.main(['--device=cuda:99', f'--out_dir={tmp_path}'])


@pytest.mark.parametrize('more, shown', [('--repeats=1', 'cached'), ('--profile=true', 'aten::'), ('--memory=true', 'checkpoint_recursion'), ('--compile=true', 'compiled')])
def test_benchmark(more, shown, capsys):
    """The benchmark runs on a GPU, and so do its profile, its table of memory and, taking minutes, torch.compile."""
    bench.main(['--device=cuda', '--n_embd=64', '--n_head=2', '--vocab_size=500', '--vision_dim=64', '--n_answer=4', '--inner_steps=2', '--batch_size=2', '--repeats=1',
                '--peak_size=512', more])
    assert shown in capsys.readouterr().out


def test_compiled(flags, tmp_path, capsys):
    """torch.compile works on a GPU and learns the same."""
    for compile in ('false', 'true'):
        train.main([*flags, f'--compile={compile}', f'--out_dir={tmp_path / compile}'])
    assert 'torch.compile does not work here' not in capsys.readouterr().out
    assert losses(tmp_path / 'true') == pytest.approx(losses(tmp_path / 'false'), abs=.15)
