"""train.py: runs through the command line, resuming, and what can go wrong."""

import copy
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import types
from contextlib import redirect_stdout

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image

import eval as evaluation
import train
from configurator import configure
from data import Questions, train_bpe
from encoder import Encoder, EncoderConfig, load_encoder, save_encoder
from lab.compare import compare
from model import Decoder
from plumbing.optimizers import Guard, Muon, orthogonal
from plumbing.plots import draw_curves
from plumbing.results import picture_of
from plumbing.run import FORMAT, read_checkpoint, read_log
from plumbing.tables import SPLITS
from prepare import shapes

TINY = ['--max_steps=12', '--eval_interval=4', '--log_interval=4', '--batch_size=8', '--n_embd=16', '--n_head=2', '--device=cpu',
        '--inner_steps=2', '--max_question_tokens=40']


@pytest.fixture(scope='module')
def flags(tiny_shapes, tiny_encoder, tmp_path_factory):
    cache = tmp_path_factory.mktemp('cache')
    return [*TINY, f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--cache_dir={cache}']


def weights(out_dir):
    return read_checkpoint(out_dir)['state']['model']


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a | b)


@pytest.mark.parametrize('config', ['trm', 'plain', 'blind', 'elastic'])
def test_answer_stage(config, flags, tmp_path, capsys):
    """Every ready config trains, evaluates and writes all its files; eval.py repeats the result and answers about a picture."""
    out = tmp_path / config
    train.main([str(ROOT / f'config/{config}.py'), *flags, f'--out_dir={out}'])
    if config == 'plain':
        with pytest.raises(ValueError, match='plain decoder'):
            evaluation.main([f'--out_dir={out}', '--device=cpu', '--inner_steps=3'])
    text = capsys.readouterr().out
    assert 'expected loss at the start' in text and 'mean of types' in text and '2 hops' in text
    assert {p.name for p in out.iterdir()} >= {'ckpt.pt', 'metrics.json', 'log.jsonl', 'predictions.jsonl', 'samples.png'}
    metrics = json.loads((out / 'metrics.json').read_text())
    assert metrics['step'] == 12 and 0 <= metrics['em'] <= 1 and metrics['parameters']['core'] > 0 and metrics['commit']
    predictions = [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]
    asked = [p for p in predictions if p['type'] != 'describe']
    assert sum(p['em'] for p in asked) / len(asked) == metrics['em'] and metrics['n'] == len(asked)
    events = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [e['step'] for e in events if e['event'] == 'step'] == [4, 8, 12]
    assert abs(events[1]['loss'] - math.log(400)) < 1

    evaluation.main([f'--out_dir={out}', '--device=cpu'])
    again = json.loads((out / 'metrics.json').read_text())
    assert all(again[key] == metrics[key] for key in ('em', 'f1', 'em_types', 'step', 'settings'))
    capsys.readouterr()
    evaluation.main([f'--out_dir={out}', f"--image={out / 'samples.png'}", '--question=What color is the circle?', '--device=cpu'])
    assert capsys.readouterr().out.count('\n') == 1


def caught(name, argv, patch):
    """The arguments that train.py gives to one of its functions, which is not called, in a run of one step."""
    seen = []
    patch.setattr(train, name, lambda *args, **kwargs: seen.append(args) or 0)
    if name != 'judge_test_split':
        patch.setattr(train, 'judge_test_split', lambda *args: None)
    train.main([*argv, '--max_steps=1'])
    return seen[0]


def test_flops(flags, tmp_path):
    """The FLOPs of a training step are the mean over the batches of an epoch, captions among them, though few of them are counted."""
    with pytest.MonkeyPatch.context() as patch:
        model, tokens_of, questions, s = caught('flops_per_row', [*flags, f'--out_dir={tmp_path}'], patch)
    flops = lambda n=16: train.flops_per_row(model, tokens_of, questions, s, n)
    assert len({len(rows) for rows in questions.epoch(s.batch_size, s.seed, 0)}) > 1
    assert flops() == pytest.approx(flops(10 ** 6), rel=.03)
    rows = questions.epoch(s.batch_size, s.seed, 0)[0]
    questions.epoch = lambda *_: [rows]  # one row of a batch stands for all
    batch = questions.batch(rows)
    vision, _ = tokens_of(batch)
    whole = train.flops_of(lambda: model['decoder'](vision, batch['question'], batch['answer'], batch['targets'])[1].backward())
    assert flops() == whole / s.batch_size


def test_flops_of_elastic_depth(flags, tmp_path):
    """With drawn passes the FLOPs of a training step are their mean over the draws, and those of a fixed depth at its own."""
    flops = {}
    for name, more in dict(two=['--inner_steps=2'], five=['--inner_steps=5'], drawn=['--min_inner_steps=2', '--inner_steps=6']).items():
        with pytest.MonkeyPatch.context() as patch:
            flops[name] = train.flops_per_row(*caught('flops_per_row', [*flags, f'--out_dir={tmp_path}/{name}', *more], patch))
    passes = 2 + 4 / 9 + 4 / 16 + 4 / 25 + 4 / 36
    assert flops['drawn'] == pytest.approx(flops['two'] + (passes - 2) * (flops['five'] - flops['two']) / 3)


def test_passes_of_steps(flags, tmp_path, monkeypatch):
    """Every step draws its passes by (seed, step): the same ones for all its micro-batches and after a resume, from the least to the most, the
    deeper the rarer; without min_inner_steps there is nothing to draw."""
    s = train.TrainConfig(min_inner_steps=2, inner_steps=16)
    drawn = [train.passes_of_step(step, s) for step in range(20_000)]
    assert min(drawn) == 2 and max(drawn) == 16
    for k in (3, 4, 8, 16):
        assert sum(n >= k for n in drawn) / len(drawn) == pytest.approx((2 / k) ** 2, rel=.12)
    assert sum(drawn) / len(drawn) == pytest.approx(train.mean_passes(s), rel=.02)
    assert drawn[:50] != [train.passes_of_step(step, train.TrainConfig(seed=1, min_inner_steps=2, inner_steps=16)) for step in range(50)]
    assert train.passes_of_step(3, train.TrainConfig()) is None
    later = train.TrainConfig(min_inner_steps=2, inner_steps=16, draw_after=.75, max_steps=20_000)
    late = [train.passes_of_step(step, later) for step in range(20_000)]
    assert set(late[:15_000]) == {2} and late[15_000:] == drawn[15_000:] and sum(late) / len(late) == pytest.approx(train.mean_passes(later), rel=.02)

    seen = []
    forward = Decoder.forward

    def noted(decoder, *args, **more):
        if decoder.training:
            seen.append(args[4])
        return forward(decoder, *args, **more)
    monkeypatch.setattr(Decoder, 'forward', noted)
    elastic = [*flags, '--min_inner_steps=1', '--inner_steps=5', '--grad_accum=2', '--max_answer_tokens=16', '--truncate=true']
    train.main([*elastic, f'--out_dir={tmp_path}/whole'])
    whole = [seen[2 * k] for k in range(12)]
    assert seen[:24:2] == seen[1:24:2] == whole == [train.passes_of_step(k, train.TrainConfig(min_inner_steps=1, inner_steps=5)) for k in range(12)] and len(set(whole)) > 2
    train.main([*elastic, f'--out_dir={tmp_path}/parts', '--max_steps=8'])
    seen.clear()
    train.main([*elastic, f'--out_dir={tmp_path}/parts', '--max_steps=12'])
    assert seen[:8:2] == whole[8:]


def test_log_counts_rows(flags, tmp_path):
    """A log line counts the rows that were there, fewer where answers are long, and a validation has the seconds of training until then."""
    train.main([*flags, f'--out_dir={tmp_path}/a', '--grad_accum=2', '--log_interval=5'])
    events = read_log(tmp_path / 'a')
    settings = events[0]['settings']
    with pytest.MonkeyPatch.context() as patch:
        questions = caught('flops_per_row', [*flags, f'--out_dir={tmp_path}/b'], patch)[2]
    sizes = [len(questions.rows_of_step(k, settings['batch_size'], settings['seed'])) for k in range(24)]
    first = next(e for e in events if e['event'] == 'step')
    assert len(set(sizes)) > 1 and first['examples_per_s'] * first['train_s'] == pytest.approx(sum(sizes[:10]))
    seconds = [e['train_s'] for e in events if e['event'] != 'start']  # steps 4, 5, 8, 10, 12, 12
    assert len(seconds) == 6 and seconds == sorted(seconds) and seconds[0] > 0


def test_eval_options(flags, tmp_path, capsys, monkeypatch):
    """Another split, depth or temperature is evaluated without touching the run's own files."""
    out = tmp_path / 'a'
    train.main([*flags, f'--out_dir={out}'])
    before = (out / 'metrics.json').read_bytes()
    evaluate, losses = evaluation.evaluate, []

    def remembered(*args, **kwargs):
        metrics, predictions = evaluate(*args, **kwargs)
        losses.append((metrics.get('loss'), [p['prediction'] for p in predictions]))
        return metrics, predictions
    monkeypatch.setattr(evaluation, 'evaluate', remembered)
    tables = []
    for option in (['--split=val'], ['--inner_steps=3'], ['--outer_steps=2'], ['--seed=3'], ['--temperature=1', '--top_k=5', '--seed=3'], ['--halt=9'], ['--halt=.01', '--inner_steps=5']):
        capsys.readouterr()
        evaluation.main([f'--out_dir={out}', '--device=cpu', '--batch_size=64', *option])
        tables.append(capsys.readouterr().out)
        assert 'nothing written' in tables[-1]
    passes = [re.search(r'^all .*\| (\d+\.\d+)$', table, re.MULTILINE)[1] for table in tables if 'passes' in table]
    assert len(passes) == 2 and passes[0] == '2.000' and 2 < float(passes[1]) <= 5
    assert len({loss for loss, _ in losses[:5]}) == 4                          # every option had an effect, but for the last two, which have none on a loss
    assert losses[3][0] == losses[4][0] and losses[3][1] != losses[4][1]   # the greedy answers and drawn ones
    assert (out / 'metrics.json').read_bytes() == before


def test_trained_along(flags, tmp_path):
    """train_encoder=True changes the encoder, keeps it in the checkpoint, and evaluates with it."""
    out = tmp_path / 'a'
    train.main([*flags, f'--out_dir={out}', '--train_encoder=true'])
    run = read_checkpoint(out)
    _, encoders, _ = evaluation.load_run(run, 'cpu')
    assert encoders['encoder'].fingerprint() != run['encoder_fingerprint']
    evaluation.main([f'--out_dir={out}', '--device=cpu'])


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_encoder_lr(optimizer, flags, tiny_encoder, tmp_path):
    """With a tiny encoder_lr the encoder that is trained along hardly moves, every part of it, while the decoder learns as it does without."""
    start, moved, decoder = load_encoder(tiny_encoder).state_dict(), {}, {}
    for share in ('1', '1e-6'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, 'judge_test_split', lambda *args: None)
            train.main([*flags, '--max_steps=3', '--eval_interval=3', '--ema=0', '--train_encoder=true', f'--optimizer={optimizer}', f'--encoder_lr={share}', f'--out_dir={tmp_path / share}'])
        best = read_checkpoint(tmp_path / share)['run']['best']
        moved[share] = [(t - start[key]).abs().max().item() for key, t in best['encoder'].items()]
        decoder[share] = best['decoder']['blocks.0.fc1.weight']
    assert max(moved['1e-6']) < 1e-6
    assert sum(value > 1e-4 for value in moved['1']) > (len(moved['1']) + 1) / 2
    assert not torch.equal(decoder['1'], decoder['1e-6']) and (decoder['1'] - decoder['1e-6']).abs().mean() < 1e-2


def test_settings_of_the_encoder(flags):
    """How pictures become square and upright is taken from the settings where they say it."""
    for flags_, expected in (([], (True, 'squash')), (['--upright=false', '--fit=pad'], (False, 'pad'))):
        settings, _ = configure(train.TrainConfig, [*flags, *flags_])
        config = train.encoder_of_run('encoder', dataclasses.asdict(settings)).config
        assert (config.upright, config.fit) == expected


def test_recomputing_the_steps_changes_nothing(flags, tmp_path):
    """A run with --checkpoint_recursion ends with the weights of one without."""
    for value in ('false', 'true'):
        train.main([*flags, '--dtype=float32', '--max_steps=4', f'--checkpoint_recursion={value}', f'--out_dir={tmp_path}/{value}'])
    a, b = (weights(tmp_path / value) for value in ('false', 'true'))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    assert [read_checkpoint(tmp_path / value)['model_config']['checkpoint_recursion'] for value in ('false', 'true')] == [False, True]


@pytest.mark.parametrize('option', ['--vision_dim=8', '--grad_accum=2', '--grad_clip=0', '--ema=0', '--recursion=add', '--recursion=loop', '--norm=pre', '--outer_steps=2',
                                    '--outer_steps=2 --deep_supervision=true',
                                    '--prefix_lm=false', '--dtype=bfloat16', '--warmup_ratio=0.9', '--min_lr_ratio=0', '--weight_decay=0',
                                    '--vocab_size=300', '--n_layer=1', '--cache=false', '--encoder_px=128', '--activation=quick_gelu', '--optimizer=adamw', '--momentum=0.8', '--beta1=0.8', '--beta2=0.99', '--learning_rate=1e-4', '--seed=7'])
def test_settings_matter(option, flags, tmp_path):
    """Every one of these settings changes the weights that come out: none is read and then forgotten."""
    more = ['--max_steps=3', '--eval_interval=3', '--max_question_tokens=60', '--max_answer_tokens=120', '--dtype=float32']
    ends = []
    for name, flag in (('a', option.split()[:-1]), ('b', option.split())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, 'judge_test_split', lambda *args: None)
            train.main([*flags, *more, *flag, f'--out_dir={tmp_path / name}'])
        ends.append(read_checkpoint(tmp_path / name)['run']['best']['decoder'])
    a, b = ends
    assert a.keys() != b.keys() or any(a[k].shape != b[k].shape or not torch.equal(a[k], b[k]) for k in a)


def test_gradient_accumulation(flags, tmp_path, monkeypatch):
    """The gradient of an accumulated step is the mean of the gradients of its batches, clipped only together; so is its loss."""
    all_reduce, make, grads, started = train.all_reduce, train.make_optimizers, [], []
    monkeypatch.setattr(train, 'all_reduce', lambda parameters, values: (grads.append([p.grad.clone() for p in parameters]), all_reduce(parameters, values))[1])
    monkeypatch.setattr(train, 'make_optimizers', lambda parts, s, dtype: (started.append(copy.deepcopy(parts[0][1])), make(parts, s, dtype))[1])
    _, tokens_of, questions, s = caught('flops_per_row', [*flags, '--dtype=float32', '--grad_accum=2', '--log_interval=1', '--grad_clip=1e-6', f'--out_dir={tmp_path}'], monkeypatch)
    decoder, losses = started[0], []
    for step in (0, 1):
        batch = questions.batch(questions.rows_of_step(step, s.batch_size, s.seed))
        losses.append(decoder(tokens_of(batch)[0], batch['question'], batch['answer'], batch['targets'])[1])
        losses[-1].backward()
    assert all(torch.allclose(grad, p.grad / 2, atol=1e-7) for grad, p in zip(grads[0], decoder.parameters(), strict=True))
    assert read_log(tmp_path)[1]['loss'] == pytest.approx(sum(losses).item() / 2, abs=1e-5)


def test_resume_is_exact(flags, tmp_path, monkeypatch, capsys):
    """A run killed after its first checkpoint and started again with the same command ends with the same weights, to the bit; the seconds of
    training since the last log line are not forgotten, and the optimizer is today's, even if older code began the run."""
    flags = [*flags, '--log_interval=5']
    train.main([*flags, f"--out_dir={tmp_path / 'whole'}"])

    class Killed(BaseException):
        pass

    def killed_at_6(step, settings, lr=train.learning_rate):
        if step == 6:
            raise Killed
        return lr(step, settings)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, 'learning_rate', killed_at_6)
        train.main([*flags, f"--out_dir={tmp_path / 'killed'}"])
    saved = read_checkpoint(tmp_path / 'killed')
    at_4 = saved['run']
    assert at_4['step'] == at_4['since'] == 4 and at_4['since_s'] > 0 == at_4['train_s']
    for group in saved['state']['optimizer 0']['param_groups']:
        group |= dict(fused=None, capturable=False)  # as older code wrote them
    torch.save(saved, tmp_path / 'killed/ckpt.pt')
    train.main([*flags, f"--out_dir={tmp_path / 'killed'}"])
    assert 'going on at step 4' in capsys.readouterr().out
    assert all(group['fused'] and group['capturable'] for group in read_checkpoint(tmp_path / 'killed')['state']['optimizer 0']['param_groups'])
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed'))
    steps = [json.loads(line)['step'] for line in (tmp_path / 'killed/log.jsonl').read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_validation_that_fails_costs_no_step(flags, tmp_path, monkeypatch):
    """A run is saved before it validates, with no more rows at once than training has; one that dies in a validation, or right after its log line, goes on to the same end and log."""
    quick, save, sizes = evaluation.quick_scores, train.save, []

    def full(*args, **more):
        raise MemoryError

    def measured(decoder, questions, tokens_of, *args, **more):
        def look(batch):
            sizes.append(len(batch['picture']))
            return tokens_of(batch)
        return quick(decoder, questions, look, *args, **more)

    def killed(out_dir, checkpoint, run, parts):
        if run.validated == 8:
            raise KeyError
        save(out_dir, checkpoint, run, parts)

    again = [*flags, f'--out_dir={tmp_path}/killed']
    train.main([*flags, f'--out_dir={tmp_path}/whole'])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(evaluation, 'quick_scores', full)
        train.main(again)
    assert read_checkpoint(tmp_path / 'killed', unfinished=True)['run']['step'] == 4
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(evaluation, 'quick_scores', measured)
        patch.setattr(train, 'save', killed)
        train.main(again)
    assert 0 < max(sizes) <= 8
    train.main(again)
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed'))
    a, b = [[(e['event'], e['step'], e.get('loss')) for e in read_log(tmp_path / name) if e['event'] != 'start'] for name in ('whole', 'killed')]
    assert a == b and [step for event, step, _ in a if event == 'eval'] == [4, 8, 12]


def test_more_steps(flags, tmp_path, capsys):
    """A finished run goes on from where it ended when max_steps is raised, and says what its learning rate does; an unfinished one, or a lower max_steps, is refused."""
    again = [*flags, f'--out_dir={tmp_path}']
    train.main(again)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match='max_steps=12 there, 8 here'):
        train.main([*again, '--max_steps=8'])
    train.main([*again, '--max_steps=20'])
    said = capsys.readouterr().out
    assert 'going on after step 12, where the run ended, up to 20: the learning rate was 2.0e-04 and is 8.8e-04 now' in said
    events = read_log(tmp_path)
    assert [e['step'] for e in events if e['event'] == 'eval'] == [4, 8, 12, 16, 20] and not same(before, weights(tmp_path))
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    (tmp_path / 'metrics.json').write_text(json.dumps(metrics | dict(step=12)))  # as it is where the run is killed before its second evaluation
    evaluation.main([f'--out_dir={tmp_path}', '--device=cpu'])
    assert 'the run is not finished' in capsys.readouterr().out
    train.main([*again, '--max_steps=20'])
    assert 'this is its result' not in capsys.readouterr().out
    assert json.loads((tmp_path / 'metrics.json').read_text())['step'] == 20 == read_checkpoint(tmp_path)['settings']['max_steps']


def test_init_from(flags, tmp_path, capsys):
    """A run starts from the best decoder and the tokenizer of another one, whatever its data, and says so; one whose decoder does not fit is refused."""
    train.main([*flags, f'--out_dir={tmp_path}/a'])
    before = read_checkpoint(tmp_path / 'a')
    more = [*flags, f'--init_from={tmp_path}/a', '--max_steps=1', '--learning_rate=1e-12', '--ema=0', '--weight_decay=0']
    train.main([*more, f'--out_dir={tmp_path}/b', '--vocab_size=300'])
    after = read_checkpoint(tmp_path / 'b')
    assert f'starting from {tmp_path}/a: its decoder after {before["run"]["best"]["step"]} steps' in capsys.readouterr().out
    assert after['tokenizer'] == before['tokenizer']
    assert all((t - before['run']['best']['decoder'][key]).abs().max() < 1e-9 for key, t in after['run']['best']['decoder'].items())
    with pytest.raises(ValueError, match='init_from: the decoder of .*/a has other weights .*blocks.2'):
        train.main([*more, f'--out_dir={tmp_path}/c', '--n_layer=3'])
    with pytest.raises(ValueError, match='init_from: .*/a was trained with norm=post, here it is pre; give --norm=post'):  # of the same shapes
        train.main([*more, f'--out_dir={tmp_path}/c', '--norm=pre'])


def test_unlike_what_was_seen(flags, tiny_encoder, tmp_path, capsys):
    """A picture unlike those of training and a word that no question had get a warning beside the answer; a test picture and its question get none."""
    shapes.draw_shapes(shapes.Config(out=str(tmp_path / 'data'), n_train=600, n_val=20, n_test=20, asked=1, types='color'))
    train.main([*flags, f'--dataset={tmp_path}/data', f'--encoder={ROOT}/assets/encoder_shapes.pt', f'--out_dir={tmp_path}/run'])
    rows = train.read_rows(read_checkpoint(tmp_path / 'run')['settings']['dataset'], 'test')
    picture_of(rows, 0).save(tmp_path / 'like.png')
    Image.effect_noise((64, 64), 90).convert('RGB').save(tmp_path / 'unlike.png')
    ask = [f'--out_dir={tmp_path}/run', '--device=cpu']
    for picture, question, expected in (('like', rows.question[0], 0), ('unlike', rows.question[0], 1), ('like', 'is there a red zebra?', 1), ('unlike', 'is there a zebra?', 2)):
        capsys.readouterr()
        evaluation.main([*ask, f'--image={tmp_path}/{picture}.png', f'--question={question}'])
        said = capsys.readouterr().err
        assert said.count('take the answer with care') == expected, (picture, question, said)
        assert ('zebra' in said) == ('zebra' in question) and ('unlike those of training' in said) == (picture == 'unlike')


def test_other_settings_are_not_mixed(flags, tmp_path):
    """A folder that holds a run with other settings is refused, naming them; --fresh=true starts over."""
    train.main([*flags, f'--out_dir={tmp_path}'])
    with pytest.raises(ValueError, match='batch_size=8 there, 4 here.*--fresh=true'):
        train.main([*flags, f'--out_dir={tmp_path}', '--batch_size=4'])
    train.main([*flags, f'--out_dir={tmp_path}', '--batch_size=4', '--fresh=true'])
    assert read_checkpoint(tmp_path)['settings']['batch_size'] == 4


def test_another_dataset_under_the_same_name(flags, tiny_shapes, tmp_path):
    """A run does not go on with other rows than it began with. Where only the test split has a question that is too long, it is cut and this is said."""
    shutil.copytree(tiny_shapes, tmp_path / 'data')
    table = pq.read_table(tmp_path / 'data/test.parquet')
    longer = [question and question + ' please' * 50 * (i == 3) for i, question in enumerate(table['question'].to_pylist())]
    pq.write_table(table.set_column(table.column_names.index('question'), 'question', pa.array(longer)), tmp_path / 'data/test.parquet')
    again = [*flags, f'--dataset={tmp_path}/data', f'--out_dir={tmp_path}/run']
    with redirect_stdout(io.StringIO()) as text:
        train.main(again)
        evaluation.main([f'--out_dir={tmp_path}/run', '--device=cpu'])
    assert text.getvalue().count('test.parquet: 1 questions or answers cut to their limits') == 2 and 'written: ' in text.getvalue()
    table = pq.read_table(tmp_path / 'data/train.parquet')
    pq.write_table(table[:-1], tmp_path / 'data/train.parquet')
    with pytest.raises(ValueError, match='dataset=.*not the one that the run in .* began with.*--fresh=true'):
        train.main(again)


def test_unfinished_runs(flags, tmp_path, monkeypatch, capsys):
    """eval.py judges a run that was stopped, and leaves metrics.json to the end of it. A torn line of its log does no harm."""
    def stopping(step, settings, lr=train.learning_rate):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return lr(step, settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'learning_rate', stopping)
        train.main([*flags, f'--out_dir={tmp_path}'])
    evaluation.main([f'--out_dir={tmp_path}', '--device=cpu'])
    assert 'the run is not finished' in capsys.readouterr().out and not (tmp_path / 'metrics.json').exists()
    log = (tmp_path / 'log.jsonl').read_text()
    (tmp_path / 'log.jsonl').write_text('{"event": "start", "st}\n' + log)
    train.main([*flags, f'--out_dir={tmp_path}'])
    assert (tmp_path / 'log.jsonl').read_text().startswith(log) and json.loads((tmp_path / 'metrics.json').read_text())['step'] == 12


def test_non_finite_loss(flags, tmp_path, monkeypatch):
    """A loss that is not finite stops the run with step, learning rate and sample ids."""
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, 'forward', lambda *args: (lambda logits, loss: (logits, loss if loss is None else loss * math.nan))(*forward(*args)))
    with pytest.raises(FloatingPointError, match=r'step 0: loss nan.*lr .*samples train-\d+'):
        train.main([*flags, f'--out_dir={tmp_path}'])
    with pytest.raises(FloatingPointError, match='step 2: loss nan'):
        train.main([*flags, f'--out_dir={tmp_path}', '--skip_bad_steps=2'])
    with pytest.raises(FloatingPointError, match='step 2: loss nan'):  # two were left out, now none may be
        train.main([*flags, f'--out_dir={tmp_path}'])


def test_guard_float16():
    """A gradient that is not finite moves no weight of any optimizer; in float16 it lowers the loss scale, which is no fault, down to 1; the scale
    rises again after many good steps. After more faults than are allowed nothing moves any more, the scale neither."""
    one, other = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizers, guard = [torch.optim.AdamW([one], .1, fused=True), Muon([other], .1, .9, 0.)], Guard('cpu', torch.float16, allowed=1)
    guard.load_state_dict(dict(scale=2., _growth_tracker=Guard.DOUBLED_AFTER - 1))
    weights = []

    def step(value, loss=1.):
        one.grad, other.grad = torch.full((2, 2), value) * guard.scale, torch.eye(2) * guard.scale
        gnorm, skip, bad = train.update([one, other], optimizers, guard, torch.tensor(loss), 1.)
        assert one.grad is other.grad is None
        weights.append([one.detach().clone(), other.detach().clone()])
        return bool(skip), bool(bad), guard.scale.item()

    assert step(1.) == (False, False, 4.)                  # the last good one of many: the scale is doubled
    assert guard.state_dict() == dict(scale=4., _growth_tracker=0)
    assert step(math.nan) == (True, False, 2.) and step(math.inf) == (True, False, 1.)
    assert step(math.nan) == (True, True, 1.)              # nothing was scaled up: a fault, the one that is allowed
    assert step(1.) == (False, False, 1.) and guard.state_dict()['_growth_tracker'] == 1
    assert step(1., loss=math.nan) == (True, True, 1.)     # a second one
    assert step(1.) == (True, False, 1.) and guard.state_dict()['_growth_tracker'] == 1
    moved = [not torch.equal(a[k], b[k]) for a, b in zip(weights, weights[1:]) for k in (0, 1)]
    assert moved == [False] * 6 + [True] * 2 + [False] * 4 and all(w.isfinite().all() for both in weights for w in both)
    guard.allow(-3)                                        # a run that goes on with fewer allowed than it has had already
    assert step(1.) == (False, False, 1.) and step(1., loss=math.nan) == (True, True, 1.) and step(1.) == (True, False, 1.)
    gnorm, skip, bad = train.update([one, other], optimizers, Guard('cpu', torch.float16, allowed=0), torch.tensor(1.), 1.)  # no row trains anything
    assert not gnorm and not skip and not bad
    assert Guard('cpu', torch.bfloat16, allowed=0).state_dict() == {}


def test_results_read_late(flags, tmp_path, monkeypatch):
    """A run that asks its device only now and then, as on a GPU, makes the same steps: the same weights, the same log; bad steps are left out, and one too many ends it
    with the state before that step saved, though later ones were begun, and it goes on from there as if it had asked each time."""
    forward, calls = Decoder.forward, []

    def sometimes_bad(self, *args, **more):
        logits, loss = forward(self, *args, **more)
        if self.training:
            calls.append(1)
        return logits, loss * math.nan if self.training and len(calls) in bad else loss

    def run(name, every, *more):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, 'forward', sometimes_bad)
            patch.setattr(train, 'reads_results', lambda step, s, device, stop: step % every == 0 or train.is_due(step, s))
            train.main([*flags, f'--out_dir={tmp_path / name}', '--log_interval=6', '--eval_interval=6', *more])

    bad = (2, 6)
    for name, every in (('at_once', 1), ('late', 6)):
        run(name, every, '--skip_bad_steps=2')
    assert same(weights(tmp_path / 'at_once'), weights(tmp_path / 'late'))
    for key in ('event', 'step', 'loss', 'gnorm', 'lr', 'em', 'problem'):
        a, b = ([event.get(key) for event in read_log(tmp_path / name)] for name in ('at_once', 'late'))
        assert sorted(map(str, a)) == sorted(map(str, b))
    assert 'NaN' not in (tmp_path / 'late/log.jsonl').read_text()  # the sixth step is the last of its line
    bad = (2, 4, 5)
    for name, every in (('stopped_at_once', 1), ('stopped_late', 6)):
        with pytest.raises(FloatingPointError, match='step 3: loss nan.*the state before this step is saved'):
            run(name, every, '--skip_bad_steps=1')
    a, b = (read_checkpoint(tmp_path / name, unfinished=True) for name in ('stopped_at_once', 'stopped_late'))
    assert a['run']['step'] == b['run']['step'] == 3 and a['run']['bad_steps'] == b['run']['bad_steps'] == 1
    assert a['run']['total'] == b['run']['total'] and a['run']['since'] == b['run']['since'] == 2
    for part in ('model', 'ema'):
        assert all(torch.equal(p, b['state'][part][key]) for key, p in a['state'][part].items())
    bad = ()
    for name in ('stopped_at_once', 'stopped_late'):  # with fewer allowed than it has had
        run(name, 1)
    assert not torch.equal(read_checkpoint(tmp_path / name)['state']['model']['decoder.embed.weight'], b['state']['model']['decoder.embed.weight'])
    assert same(weights(tmp_path / 'stopped_at_once'), weights(tmp_path / 'stopped_late'))


def test_captions_only(flags, tiny_shapes, tmp_path):
    """A data set of captions alone trains, keeps the checkpoint of the least validation loss, and is compared."""
    tables = [pq.read_table(tiny_shapes / f'{split}.parquet') for split in ('train', 'val', 'test')]
    captions = pa.concat_tables(tables).to_pylist()
    captions = [row | dict(type='coco') for row in captions if row['type'] == 'describe']  # a caption, whatever its source is called
    (tmp_path / 'data').mkdir()
    for k, split in enumerate(('train', 'val', 'test')):
        pq.write_table(pa.Table.from_pylist(captions[k::3], tables[0].schema), tmp_path / f'data/{split}.parquet')
    for seed in (1, 2):
        train.main([*flags, f'--dataset={tmp_path}/data', f'--seed={seed}', '--learning_rate=0.3', '--min_lr_ratio=0.9', '--ema=0', f'--out_dir={tmp_path}/{seed}'])
        curve = {e['step']: e['loss'] for e in read_log(tmp_path / str(seed)) if e['event'] == 'eval'}
        assert json.loads((tmp_path / f'{seed}/metrics.json').read_text())['best_step'] == min(curve, key=curve.get)
    assert compare([tmp_path / '1', tmp_path / '2']).count(' | ') > 10


def test_columns_of_numbers(flags, tiny_shapes, tmp_path):
    """Types and sample ids that are numbers in the data set become text; 0 is one."""
    (tmp_path / 'data').mkdir()
    for split in ('train', 'val', 'test'):
        table = pq.read_table(tiny_shapes / f'{split}.parquet').drop_columns(['type', 'sample_id'])
        n = table.num_rows
        pq.write_table(table.append_column('type', pa.array([i % 2 for i in range(n)])).append_column('sample_id', pa.array(range(n))), tmp_path / f'data/{split}.parquet')
    train.main([*flags, f'--dataset={tmp_path}/data', '--max_steps=1', f'--out_dir={tmp_path}/a'])
    assert set(json.loads((tmp_path / 'a/metrics.json').read_text())['by_type']) == {'0', '1', 'describe'}  # a caption stays one
    assert json.loads((tmp_path / 'a/predictions.jsonl').read_text().splitlines()[0])['sample_id'] == '0'


def test_bad_checkpoints(tmp_path, flags):
    """A checkpoint of another format, a torn one and one with code in it are refused with one message."""
    path = tmp_path / 'ckpt.pt'
    torch.save(dict(format=99), path)
    with pytest.raises(ValueError, match=f'checkpoint format 99, this code reads format {FORMAT}'):
        read_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(ValueError, match='not a file that can be read safely'):
        read_checkpoint(tmp_path)
    torch.save(dict(format=FORMAT, evil=print), path)
    with pytest.raises(ValueError, match='not a file that can be read safely'):
        read_checkpoint(tmp_path)


def test_errors_are_one_line(tmp_path):
    """A user's mistake ends a script with one line on stderr and a code that is not zero."""
    import subprocess
    for script, argv, message in (('train.py', ['--n_layers=3'], 'no such setting'), ('eval.py', [f'--out_dir={tmp_path}'], 'no such file; a run writes it'),
                                  ('train.py', [f'{ROOT}/config/trm.py', f'--dataset={tmp_path}/none', '--device=cpu'], 'no such file; a dataset is a folder'),
                                  ('data.py', ['shapes', '--max_hops=9'], 'max_hops=9: expected 1 to 8')):
        done = subprocess.run([sys.executable, ROOT / script, *argv], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and message in done.stderr, done.stderr


def test_learning_rate():
    """Linear warm-up, cosine from the peak to min_lr_ratio of it."""
    settings = train.TrainConfig(max_steps=100, warmup_ratio=.1, learning_rate=1., min_lr_ratio=.1)
    rates = [train.learning_rate(step, settings) for step in range(101)]
    assert rates[0] == .1 and rates[9] == rates[10] == 1 and abs(rates[55] - .55) < .01 and abs(rates[100] - .1) < 1e-9
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def alone(matrix):
    return orthogonal(matrix[None], torch.float32)[0]


def test_muon():
    """Muon's step is orthogonal: it keeps the singular vectors of a matrix and brings its singular values to about 1; its RMS is
    .2 of the learning rate whatever the gradient's scale. Embeddings, the tied head, biases and the start state are AdamW's."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(32, 48), full_matrices=False)
    for g in (u @ torch.diag(torch.logspace(0, -1.5, 32)) @ v, v.T @ torch.diag(torch.logspace(0, -1.5, 32)) @ u.T):
        x = alone(g)
        assert x.shape == g.shape and ((.6 < torch.linalg.svdvals(x)) & (torch.linalg.svdvals(x) < 1.3)).all()
        assert torch.allclose(alone(1e3 * g), x, atol=1e-4)
    back = u.T @ alone(u @ torch.diag(torch.logspace(0, -1.5, 32)) @ v) @ v.T
    assert torch.allclose(back, back.diag().diag(), atol=1e-4)

    p = torch.nn.Parameter(torch.randn(48, 32))
    start, p.grad = p.detach().clone(), 100 * torch.randn(48, 32)
    Muon([p], lr=.01, momentum=.95, weight_decay=0.).step()
    assert .15 < (p - start).pow(2).mean().sqrt() / .01 < .25

    # matrices of one shape go through together, and each as if it were alone; in bfloat16 nearly so
    stack = torch.randn(3, 48, 32)
    assert torch.allclose(orthogonal(stack, torch.float32), torch.stack([alone(g) for g in stack]), atol=1e-5)
    assert (orthogonal(stack, torch.bfloat16) - orthogonal(stack, torch.float32)).abs().max() < .05

    model = train.build_model(train.ModelConfig(n_embd=16, vision_dim=8))
    adamw, muon = train.make_optimizers([(1.0, model)], train.TrainConfig())
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for group in adamw.param_groups for p in group['params']} == {'embed.weight', 'vision_proj.bias', 'z_start'}
    assert len([p for group in muon.param_groups for p in group['params']]) == len(names) - 3
    assert len(train.make_optimizers([(1.0, model)], train.TrainConfig(optimizer='adamw'))) == 1
    # which words there are changes nothing, though a layer of an MLP may have the embedding's shape
    model = train.build_model(train.ModelConfig(n_embd=16, vision_dim=8, vocab_size=4 * 16))
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for group in train.make_optimizers([(1.0, model)], train.TrainConfig())[0].param_groups for p in group['params']} == {'embed.weight', 'vision_proj.bias', 'z_start'}
    model = train.build_model(train.ModelConfig(n_embd=16, vision_dim=8, tied_head=False))
    assert not any(p is model.head.weight for group in train.make_optimizers([(1.0, model)], train.TrainConfig())[1].param_groups for p in group['params'])


def test_dtype(monkeypatch):
    """auto takes bfloat16 only where the hardware has it."""
    assert train.pick_dtype('float32', 'cpu') == torch.float32 and train.pick_dtype('bfloat16', 'cpu') == torch.bfloat16
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: fast)
        assert train.pick_dtype('auto', 'cpu') == dtype


def test_compile_falls_back(monkeypatch, capsys):
    """Without a working compiler, training goes on uncompiled and says why; with one, every layer is compiled."""
    def broken(*args, **kwargs):
        raise RuntimeError('no compiler found')
    monkeypatch.setattr(torch, 'compile', broken)
    model, layers = torch.nn.ModuleDict(dict(blocks=torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]))), []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda layer: layers.append(layer))
    train.compile_layers(model, 'cpu')
    assert not layers and 'no compiler found' in capsys.readouterr().out
    monkeypatch.setattr(torch, 'compile', lambda f: f)
    train.compile_layers(model, 'cpu')
    assert layers == [*model['blocks']]


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on a CPU')
def test_compiled_training(flags, tmp_path):
    """A compiled run, whose questions and captions have different shapes, learns as one without torch.compile does; deeper recursion compiles no more, and
    what is judged is not compiled, even without averaged weights."""
    torch._dynamo.utils.counters.clear()
    losses, graphs = {}, {}
    for flag, n in (('false', 2), ('true', 2), ('true', 4)):
        name = f'{flag}_{n}'
        train.main([*flags, f'--compile={flag}', f'--inner_steps={n}', '--n_layer=1', '--ema=0', '--dtype=bfloat16', f'--out_dir={tmp_path / name}'])
        losses[name] = [e['loss'] for e in read_log(tmp_path / name) if e['event'] == 'step']
        graphs[name] = torch._dynamo.utils.counters['stats']['unique_graphs']
    assert losses['true_2'] == pytest.approx(losses['false_2'], abs=.02)
    assert graphs['false_2'] == 0 < graphs['true_2'] <= 6 and graphs['true_4'] == graphs['true_2'], graphs


def test_wandb(flags, tmp_path, monkeypatch):
    """wandb=True logs the same numbers there, and without the package says how to get it."""
    logged = []
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(
        init=lambda **kwargs: types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))))
    train.main([*flags, f"--out_dir={tmp_path / 'a'}", '--wandb=true'])
    assert any('eval/em' in values for _, values in logged) and any('step/loss' in values for _, values in logged)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ValueError, match='pip install wandb'):
        train.main([*flags, f"--out_dir={tmp_path / 'b'}", '--wandb=true'])


def test_curves_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Without matplotlib one line says how to get the curves."""
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    draw_curves(tmp_path)
    assert 'pip install matplotlib' in capsys.readouterr().out


def test_learns_a_dataset_by_heart(tmp_path, monkeypatch, capsys):
    """The whole way from files to answers: what depends on picture and question, and has several tokens, is learnt and written exactly, whatever place a picture has in its
    split; validation's Exact Match is that of writing; the weights that are kept are the best; the test split is opened at the end; eval.py answers about a file."""
    answers = {'what is it': ['red', 'blue sky', 'dog', 'big old tree', 'nine', 'sea', 'two cats', 'sun'], 'who is it': ['tom', 'ann lee', 'jim', 'max', 'old mary sue', 'bo', 'eve', 'pat']}
    pictures = []
    for k in range(8):
        picture = Image.new('RGB', (64, 64), (236, 236, 236))
        picture.paste(list(shapes.COLORS.values())[k], (10, 10 + 5 * k, 24, 24 + 5 * k))
        picture.save(tmp_path / f'{k}.png')
        pictures.append((tmp_path / f'{k}.png').read_bytes())
    (tmp_path / 'data').mkdir()
    for shift, split in enumerate(SPLITS):
        rows = [dict(image=pictures[k], question=q, answer=a[k], sample_id=f'{q}-{k}', type='who' if 'who' in q else 'what', caption=None)
                for k in (5 * i + 3 * shift for i in range(8)) for k in [k % 8] for q, a in answers.items()]
        if split == 'val':
            rows.append(dict(image=pictures[0], question=None, answer=None, sample_id='c', type=None, caption='a caption that nobody knows'))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f'data/{split}.parquet')

    events, quick, read = [], evaluation.quick_scores, train.read_rows

    def both(decoder, questions, tokens_of, device, batch_size):
        scores, (written, _) = quick(decoder, questions, tokens_of, device, batch_size), evaluation.evaluate(decoder, questions, tokens_of, device)
        assert scores['em'] == pytest.approx(written['em']) and questions.rows.path.name == 'val.parquet'
        events.append(scores['em'])
        return scores
    monkeypatch.setattr(evaluation, 'quick_scores', both)
    monkeypatch.setattr(train, 'read_rows', lambda folder, split: events.append(split) or read(folder, split))
    train.main(['--max_steps=140', '--eval_interval=20', '--batch_size=8', '--n_embd=64', '--n_head=2', '--inner_steps=2', '--learning_rate=5e-3', '--dtype=float32', '--device=cpu', '--ema=0.9',
                f'--dataset={tmp_path}/data', f'--encoder={ROOT}/assets/encoder_shapes.pt', f'--cache_dir={tmp_path}/cache', f'--out_dir={tmp_path}/run'])
    assert events[:2] == ['train', 'val'] and events[-1] == 'test' and 'test' not in events[:-1]
    ems = events[2:-1]
    assert ems[-1] == 1 and any(0 < em < 1 for em in ems)
    metrics = json.loads((tmp_path / 'run/metrics.json').read_text())
    assert metrics['em'] == metrics['token_accuracy'] == 1 and ems[metrics['best_step'] // 20 - 1] == 1
    said = [json.loads(line) for line in (tmp_path / 'run/predictions.jsonl').read_text().splitlines()]
    asked, learnt = (read(tmp_path / 'data', split) for split in ('test', 'train'))
    assert read_checkpoint(tmp_path / 'run')['tokenizer'] == train_bpe([text for q, refs in zip(learnt.question, learnt.references) for text in (q, refs[0])], 512)
    assert [(p['sample_id'], p['prediction']) for p in said] == [(name, refs[0]) for name, refs in zip(asked.sample_id, asked.references)]
    capsys.readouterr()
    for k, q in ((2, 'what is it'), (7, 'who is it'), (4, 'who is it')):
        evaluation.main([f'--out_dir={tmp_path}/run', f'--image={tmp_path}/{k}.png', f'--question={q}', '--device=cpu'])
        assert capsys.readouterr().out.strip().endswith(answers[q][k])


def test_what_is_judged(flags, tmp_path, monkeypatch):
    """Validation and the test split judge the averaged weights; the test split, and eval.py after it, those that were best in validation, even if later ones are there."""
    judged = []
    for name in ('quick_scores', 'evaluate'):
        monkeypatch.setattr(evaluation, name, lambda decoder, *args, real=getattr(evaluation, name), **more: (
            judged.append({key: t.clone() for key, t in decoder.state_dict().items()}), real(decoder, *args, **more))[1])
    monkeypatch.setattr(train, 'better', lambda *args: False)
    train.main([*flags, f'--out_dir={tmp_path}'])
    evaluation.main([f'--out_dir={tmp_path}', '--device=cpu'])
    saved = read_checkpoint(tmp_path)
    state = {kind: {key.removeprefix('decoder.'): t for key, t in saved['state'][kind].items() if key.startswith('decoder.')} for kind in ('ema', 'model')}
    assert len(judged) == 5 and saved['run']['best']['step'] == 4                  # steps 4, 8, 12, the test split, eval.py
    assert same(judged[2], state['ema']) and not same(state['ema'], state['model'])
    assert same(judged[0], saved['run']['best']['decoder']) and not same(judged[0], judged[2])
    assert same(judged[3], judged[0]) and same(judged[4], judged[0])


def test_better():
    """The higher Exact Match is better, of captions alone the lower loss; the later of equals."""
    a, b = dict(em=.5, loss=1.), dict(em=.6, loss=2.)
    better = lambda *types: [train.better(new, old, types_of(types)) for new, old in ((a, b), (b, a), (a, a))]
    types_of = lambda types: type('', (), dict(type=types))
    assert better('color', 'describe') == [False, True, True] and better('describe') == [True, False, True]


def test_average():
    """The average follows the weights, closely at first and with the decay `ema` in the end, and not at all at a step that moves nothing; AdamW and Muon move
    all of the model."""
    torch.manual_seed(0)
    model = train.build_model(train.ModelConfig(n_embd=16, vision_dim=8))
    average, parameters = copy.deepcopy(model), list(model.parameters())
    s = train.TrainConfig(learning_rate=1e-2, ema=.3)
    optimizers, guard = train.make_optimizers([(1.0, model)], s), Guard('cpu', torch.float32, allowed=1)
    expected = [p.detach().clone() for p in parameters]
    for step, kept in enumerate((1 / 10, 2 / 11, 3 / 12, .3, .3, 1)):
        for p in parameters:
            p.grad = torch.randn_like(p)
        train.set_learning_rate(optimizers, torch.tensor(1e-2))
        loss = torch.tensor(math.nan if kept == 1 else 1.)
        _, skip, _ = train.update(parameters, optimizers, guard, loss, 1.)
        train.follow(average, model, train.ema_rate(step, s) * (1 - skip))
        expected = [kept * a + (1 - kept) * p.detach() for a, p in zip(expected, parameters)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, average.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(average.parameters(), parameters))


def test_batches_of_steps(flags, tmp_path, monkeypatch):
    """Every forward pass has a batch of its own, also where several make a step."""
    asked, rows_of_step = [], Questions.rows_of_step
    monkeypatch.setattr(Questions, 'rows_of_step', lambda questions, step, *more: asked.append(step) or rows_of_step(questions, step, *more))
    monkeypatch.setattr(train, 'judge_test_split', lambda *args: None)
    train.main([*flags, '--grad_accum=3', '--max_steps=2', f'--out_dir={tmp_path}'])
    assert asked == [0, 1, 2, 3, 4, 5]


def test_stage_one_is_elsewhere():
    """train.py says in one line where an alignment is made."""
    with pytest.raises(ValueError, match='config/align.py: stage 1 is a program of its own: python -m align config/align.py'):
        train.main(['config/align.py'])


def test_scales_have_no_weight_decay():
    """Weight decay is on matrices and the kernels of convolutions; a scale of shape (heads, 1, 1) has none."""
    model = torch.nn.Module()
    model.scale, model.kernel, model.matrix = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 1, 1), (4, 3, 2, 2), (4, 4)))
    adamw, = train.make_optimizers([(1.0, model)], train.TrainConfig(weight_decay=.05))
    assert {group['weight_decay']: [p.dim() for p in group['params']] for group in adamw.param_groups} == {.05: [4, 2], 0.: [3]}


def test_a_checkpoint_of_old(flags, tmp_path):
    """A checkpoint that this code no longer reads says which commit wrote it."""
    torch.save(dict(format=4, environment=dict(commit='87752ac')), tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='format 4, this code reads format 5; train again, or use the code that wrote it, commit 87752ac'):
        train.main([*flags, f'--out_dir={tmp_path}'])


def test_another_encoder_under_the_same_name(flags, tiny_encoder, tmp_path):
    """A run neither goes on nor is judged with another encoder than it began with."""
    (tmp_path / 'e.pt').write_bytes(tiny_encoder.read_bytes())
    run = [*flags, '--max_steps=2', '--eval_interval=2', f'--encoder={tmp_path}/e.pt', f'--out_dir={tmp_path}/run']
    train.main(run)
    torch.manual_seed(1)
    save_encoder(Encoder(EncoderConfig(width=32, n_layer=1, n_latents=4, vision_dim=16, prefixes=(4, 8, 16))), tmp_path / 'e.pt')
    with pytest.raises(ValueError, match='encoder=.*not the one that the run in .* began with.*--fresh=true'):
        train.main(run)
    with pytest.raises(ValueError, match='not the encoder that this run was trained with'):
        evaluation.main([f'--out_dir={tmp_path}/run', '--device=cpu'])


def test_optimizers_step_by_hand():
    """Weight decay shrinks matrices, those of Muon too, and nothing else; Muon's momentum is a running mean and looks one step ahead."""
    model = train.build_model(train.ModelConfig(n_embd=16, vision_dim=8))
    adamw, muon = train.make_optimizers([(1.0, model)], train.TrainConfig(weight_decay=.05))
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p]: group['weight_decay'] for group in adamw.param_groups for p in group['params']} == {'embed.weight': .05, 'vision_proj.bias': 0., 'z_start': 0.}
    assert [group['weight_decay'] for group in muon.param_groups] == [.05]
    p = torch.nn.Parameter(torch.randn(6, 4))
    start, (first, second) = p.detach().clone(), torch.randn(2, 6, 4)
    optimizer = Muon([p], lr=.01, momentum=.9, weight_decay=.5)
    p.grad = torch.zeros(6, 4)
    optimizer.step()
    assert torch.allclose(p, start * (1 - .01 * .5))
    p.data.copy_(start)
    average = torch.zeros(6, 4)
    for g in (first, second):
        p.grad, before = g.clone(), p.detach().clone()
        optimizer.step()
        average = .9 * average + .1 * g
        direction = alone(.9 * average + .1 * g)
        assert torch.allclose(p, before * (1 - .005) - .01 * .2 * 6 ** .5 * direction, atol=1e-6)
