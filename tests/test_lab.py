"""lab/: runs side by side, benchmark, states, passes, guesses."""

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_model import decoder_of, sample
from test_train import TINY

from data import read_rows
from lab import bench, demo, depths, guess, passes, states
from lab import swaps as lab_swaps
from lab.bench import BenchConfig, benchmark, main_job, show_memory, show_profile
from lab.compare import alike, compare, depth, grouped, labels, paired, spread
from lab.compare import main as compare_main
from model import RECURSIONS, ModelConfig, build_model
from plumbing.console import run_script


def metrics(em, seed=0, **settings):
    """What a finished run has written. On '2 hops' it is right in em squared of the cases."""
    row = dict(n=10, em=em, f1=em, token_accuracy=.5, loss=1.)
    settings = dict(kind='plain', n_layer=4, inner_steps=3, outer_steps=2, recursion='add', batch_size=2, grad_accum=1, dataset='d', seed=seed) | settings
    return row | dict(em_types=(em + em ** 2) / 2, by_type={'color': row, '2 hops': row | dict(em=em ** 2), 'describe': row}, step=5, train_s=9., seed=seed,
                      parameters=dict(total=1234567, core=1000), settings=settings, mflop_per_example=3e6, curve=[(1, .5, .1), (2, 1., em)], commit='abc',
                      device='a cpu', threads=2, correct='1' * round(4 * em) + '0' * round(4 - 4 * em) + '-')


def test_seeds_on_two_devices(tmp_path):
    """Runs that differ in their seed and in where and how fast they ran belong together."""
    for k, seed in enumerate((1, 2)):
        (tmp_path / f'{seed}.json').write_text(json.dumps(metrics(.5, seed, device=f'cuda:{k}', compile=bool(k), wandb=bool(k), skip_bad_steps=k)))
    assert len(grouped([tmp_path / '1.json', tmp_path / '2.json'])) == 1
    (tmp_path / '3.json').write_text(json.dumps(metrics(.5, 2, device='cuda:0')))
    assert [len(runs) for runs in grouped([tmp_path / f'{k}.json' for k in (1, 2, 3)]).values()] == [2, 1]  # a seed counts once


def test_comparison(tmp_path, monkeypatch):
    """lab.compare puts the seeds of a configuration together: mean and Student's 95 % interval; the difference to the first one is seed by seed and question by
    question; --types and --reach say what is judged and when validation had it; patterns and copies of metrics.json are read too; the pictures are drawn, or a
    line says how to get them."""
    kinds = dict(plain=dict(kind='plain', n_layer=4), trm=dict(kind='trm', n_layer=2))
    for kind, ems in dict(plain=(.5, .5, .5), trm=(.5, .75, 1.)).items():
        for seed, em in enumerate(ems):
            newer = dict(objective='both') if seed == 2 else {}            # a setting that the other runs do not know yet
            m = metrics(em, seed, **kinds[kind], **newer, out_dir=f'{kind}_{seed}')
            (tmp_path / f'{kind}_{seed}.json').write_text(json.dumps(m))
    cells = lambda text: [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if '/plain' in line or '/trm' in line]
    text = compare([tmp_path / 'plain_*', tmp_path / 'trm_*'], reach=.75)
    plain, trm, plain_scores, trm_scores = cells(text)
    half = 4.303 * .25 / 3 ** .5                                       # t at 2 degrees of freedom, standard deviation .25, 3 seeds
    near = lambda cell, mean, half: cell.startswith(f'{mean} ± ') and abs(float(cell.split()[-1]) - half) < 2e-3
    assert plain[0].endswith('/plain') and plain[1] == '3' and plain[4] == '4' and trm[4] == str(2 * 2 * (3 + 1))
    assert plain[6] == '30.0' and plain[8] == '0.375 ± 0.000' and trm[9] == '0.375 0.656 1.000' and near(trm[10], '+0.302', .7777)
    d = [0, 0, 2 / 3, 1 / 3]                                           # question by question: how much oftener the three seeds of trm are right
    sd = (sum((x - .25) ** 2 for x in d) / 4) ** .5
    assert trm[11] == f'+0.250 ± {1.96 * sd / 2:.3f}' and plain[10:] == ['-', '-', 'never, never, never'] and trm[12] == 'never, 2 (1 s), 2 (1 s)'
    assert near(trm_scores[1], '0.750', half) and trm_scores[3] == trm_scores[1] and trm_scores[4].startswith('0.604 ± ') and 'commit abc on a cpu' in text
    trm = cells(compare([tmp_path / 'plain_*', tmp_path / 'trm_*'], judged=['2 hops']))[1]
    assert trm[9] == '0.250 0.562 1.000' and trm[10].startswith('+0.354 ± ')                     # the squares of trm less plain's .25
    with pytest.raises(ValueError, match='--types=size: .* has no such type; expected some of color, 2 hops'):
        compare([tmp_path / 'plain_*'], judged=['size'])
    for name in ('comparison.png', 'comparison_curves.png'):
        assert Image.open(tmp_path / name).width > 600
    assert labels(['r/swaps_n1_lr1e-3', 'r/swaps_n2_lr1e-3']) == ['n1', 'n2'] and labels(['r/n1', 's/n1']) == ['n1', 'n1']
    assert labels(['r/flops_n1', 'r/flops_n1_lr4e-3']) == ['n1', 'n1_lr4e-3'] and labels(['r/trm_1']) == ['trm_1']
    this, that = metrics(.5), metrics(.75)
    assert paired([this], [that]) and not paired([this], [metrics(.75, dataset='e')])  # other questions
    assert not paired([this], [that | dict(correct='1-110')])
    for k, kind in enumerate(('plain', 'trm') * 2):                        # two groups whose paths begin alike keep their runs and have two names
        (tmp_path / f'x_{k}.json').write_text(json.dumps(metrics(.5, k, kind=kind)))
    assert [len(runs) for runs in grouped([tmp_path / 'x_*']).values()] == [2, 2]
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert compare([tmp_path / 'plain_0.json']).count('plain') == 2


def test_what_else_differs(tmp_path, monkeypatch, capsys):
    """lab.compare says where groups have other training steps, seeds or data; the same data under another path are the same. Names as matplotlib's mathematics are drawn as
    they stand, and a picture that fails costs no table."""
    def said(**of_two):
        for name, more in (('one', {}), ('_$two\\$', of_two)):
            m = metrics(.5, more.pop('seed', 0), kind=name, max_steps=more.pop('max_steps', 9), dataset=more.pop('dataset', 'd'))
            m['by_type']['$x_'] = m['by_type'].pop('color')
            (tmp_path / f'{name}.json').write_text(json.dumps(m | dict(dataset_fingerprint=dict(test=more.pop('sum', 'abc')))))
        text = compare([tmp_path / '*.json'])
        return [line.split(' | ')[0] for line in text.splitlines() if line.startswith('not the same')]

    assert said() == said(dataset='e/d') == []
    assert said(max_steps=3) == ['not the same max_steps'] and said(seed=3) == ['not the same seed'] and said(sum='x') == ['not the same dataset']
    assert 'not drawn' not in capsys.readouterr().out
    monkeypatch.setattr('lab.compare.draw_results', None)
    assert said() == [] and 'comparison.png: not drawn (TypeError' in capsys.readouterr().out


def test_spread(monkeypatch):
    """Half an interval has Student's t of the tables; without scipy a line says how to get it, and one run
    alone needs none."""
    # two-sided, 95 %, by degrees of freedom from 1 on
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    for degrees, t in enumerate(table, 1):
        values = [0.] * degrees + [1.]
        n = degrees + 1
        mean, half = spread(values)
        sd = (((1 - 1 / n) ** 2 + degrees / n ** 2) / degrees) ** .5
        assert mean == 1 / n and half == pytest.approx(t * sd / n ** .5, abs=5e-4 * sd / n ** .5)
    monkeypatch.setitem(sys.modules, 'scipy.stats', None)
    assert spread([.5]) == (.5, None)
    with pytest.raises(ValueError, match='pip install scipy'):
        spread([.5, .6])


def test_settings_of_other_times():
    """Runs of settings that are gone keep their depth; a setting that one of two runs does not know does not
    part them, one that both know does."""
    settings = dict(kind='trm', n_layer=2, recursion='loop', inner_steps=4, outer_steps=1)
    old = metrics(.5, **settings, norm='unbounded', shared=False)
    assert depth(old) == 8
    for recursion, blocks in dict(concat=24, loop=24, add=30).items():  # 2 cycles of 4 passes of 3 blocks, and one pass more for y
        m = dict(settings=dict(kind='trm', recursion=recursion, n_layer=3, inner_steps=4, outer_steps=2))
        assert depth(m) == blocks
    assert alike(old, metrics(.5, **settings, norm='unbounded'))
    assert not alike(old, metrics(.5, **settings, norm='post'))


@pytest.mark.parametrize('which', ['y', 'z'])
def test_forgetful(which):
    """With --forget what the first step makes of that state reaches nothing, what it makes of the other one does; writing token by token agrees with reading it all."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=11, n_embd=16, n_head=2, vision_dim=3, inner_steps=2, outer_steps=2))
    states.forgetful(decoder, which)
    vision, question = torch.randn(2, 4, 3), torch.randint(3, 11, (2, 5))
    passes = states.watch_passes(decoder)
    answer = torch.tensor([[1, 7, 5], [1, 4, 9]])
    decoder.answer_states(decoder.read_context(vision, question), answer)  # the last cycle, steps three and four, has a gradient
    (_, third), (_, fourth) = passes[2:]
    y, z = torch.autograd.grad(fourth.pow(3).mean(), third)[0].chunk(2, dim=1)
    forgotten, kept = (y, z) if which == 'y' else (z, y)
    assert forgotten.abs().max() == 0 and kept.abs().max() > 0
    written = decoder.generate(vision, question, 3)
    read = decoder(vision, question, torch.cat([torch.ones(2, 1, dtype=torch.long), written[:, :-1]], dim=1))[0].argmax(-1)
    ends = (written == 2).int().cumsum(1) - (written == 2).int()           # after the end nothing is compared
    assert ((written == read) | (ends > 0)).all()


def test_baselines(tmp_path, capsys):
    """The commonest answer, and the commonest to the same question, else to the same beginning, get what can be worked out by hand."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'PNG')
    train = [('is it red?', 'no')] * 3 + [('is it blue?', 'yes')] * 2 + [('what is it?', 'red')] * 4
    test = [('is it red?', ['no']), ('Is it blue?', ['yes']), ('is it green?', ['no']), ('how many?', ['3']), ('what is it?', ['a', 'red'])]
    for split, rows in (('train', [(q, [a]) for q, a in train]), ('test', test)):
        pq.write_table(pa.table(dict(image=[buffer.getvalue()] * len(rows), question=[q for q, _ in rows], answer=[a for _, a in rows])), tmp_path / f'{split}.parquet')
    for flag, score in (('--split=test', '0.200'), ('--question_only=true', '0.800')):
        guess.main([f'--dataset={tmp_path}', flag])
        assert f'all          |      5 | {score}' in capsys.readouterr().out


def test_left_out(tmp_path, capsys):
    """lab.compare sets runs side by side and names a folder without results."""
    for run, em in (('a', .25), ('b', .75)):
        (tmp_path / run).mkdir()
        (tmp_path / run / 'metrics.json').write_text(json.dumps(metrics(em, n_layer=round(4 * em))))
    table = compare([tmp_path / 'a', tmp_path / 'b'])
    assert '0.250' in table and '0.750' in table and '1,234,567' in table and table.count(' | ') > 40
    with pytest.raises(FileNotFoundError, match='folders of finished runs'):
        compare([tmp_path / 'c'])
    for name, text in dict(begun=None, align='{"probe": 1}').items():  # a pattern leaves out what is no finished run, and says so
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / 'metrics.json').write_text(text)
    capsys.readouterr()
    assert compare([tmp_path / '*']).count('0.750') == table.count('0.750')
    assert [line.split(': ')[0] for line in capsys.readouterr().out.splitlines()] == ['left out'] * 4  # the two pictures are no runs either
    with pytest.raises(ValueError, match='align/metrics.json: no by_type'):
        compare([tmp_path / 'align'])


def test_state_sizes():
    """'pre' and 'post' keep the states at RMS 1 over 64 passes; what is measured is what the decoder hands on."""
    vision, question, answer = sample()
    for recursion in RECURSIONS:
        ends = {}
        for placement in ('pre', 'post'):
            decoder = decoder_of(dict(recursion=recursion, norm=placement))
            sizes = states.state_sizes(decoder, vision, question, answer)
            ends[placement] = sizes[-1]
            assert len(sizes) >= 64 and all(len(size) == decoder.config.streams for size in sizes)
        assert all(abs(size - 1) < 1e-3 for placement in ('pre', 'post') for size in ends[placement])


def test_benchmark(capsys):
    """`python -m lab.bench` counts FLOPs as they follow from the shapes, and shows parameters and times for every decoder."""
    b = BenchConfig(device='cpu', n_layer=1, n_head=2, n_embd=32, inner_steps=2, vocab_size=50, vision_dim=16, n_image=5, n_question=3, n_answer=4,
                    batch_size=2, repeats=1, peak_size=64)
    C, V, D, S, A = b.n_embd, b.vocab_size, b.vision_dim, 8, 4
    T = S + 2 * A
    forward = 2 * 2 * (5 * D * C + 2 * (T * 12 * C * C + 2 * T * T * C) + A * C * V)  # 2 FLOPs, 2 rows; the naive concat loop
    benchmark(b)
    text = capsys.readouterr().out
    assert f'{forward / 1e9:.4g}' in text and 'MFU' in text
    assert all(text.count(f' {name} |') >= 3 for name in ('plain', 'concat', 'add'))
    states.show_fresh(b)
    assert 'gradient at n=16' in capsys.readouterr().out
    show_memory(b, steps=(1,))
    assert 'checkpoint_recursion' in capsys.readouterr().out
    show_profile(b)
    assert 'mm' in capsys.readouterr().out
    main_job(b, steps=2)
    text = capsys.readouterr().out
    assert all(word in text for word in ('forward', 'backward', 'optimizers', 'GFLOP', 'aten::'))


def test_benchmark_compiled(capsys, monkeypatch):
    """With --compile the compiled step is timed beside the others, and it is torch.compile's that runs."""
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda decoder, mode: lambda *batch: compiled.append(mode) or decoder(*batch))
    benchmark(BenchConfig(device='cpu', n_layer=1, n_head=2, n_embd=32, inner_steps=2, vocab_size=50, vision_dim=16, n_image=5, n_question=3, n_answer=4,
                          batch_size=2, repeats=1, peak_size=64, compile=True))
    text = capsys.readouterr().out
    assert text.count(' compiled |') * 4 == len(compiled) and text.count(' - |') == 2 * text.count(' compiled |')


def test_encoder_benchmark(tiny_encoder, monkeypatch, capsys):
    """The encoder of a file, and one of random weights, is timed."""
    monkeypatch.setattr(bench, 'EDGE_GLASS_CONFIG', bench.load_encoder(tiny_encoder).config)
    for encoder, about in ((tiny_encoder, 'fingerprint'), ('random', 'random weights')):
        bench.main([f'--encoder={encoder}', '--pictures=2', '--device=cpu'])
        text = capsys.readouterr().out
        words = (about, 'decoding, all cores', 'encoding, float32', 'encoding, bfloat16', 'GB of memory')
        assert all(word in text for word in words)


def test_bad_bench_settings():
    """A setting out of range, or two things to do at once, is an error that names it."""
    with pytest.raises(ValueError, match='repeats=0'):
        BenchConfig(repeats=0)
    with pytest.raises(ValueError, match='--memory, --profile, --encoder, --decoder and --scale: one at a time'):
        BenchConfig(memory=True, profile=True)


@pytest.mark.parametrize('recursion', RECURSIONS)
def test_attention_is_the_decoders(recursion):
    """What is noted of attention is what the decoder does: with it the output of every layer in every pass is
    made again; the hooks are off afterwards."""
    decoder = decoder_of(dict(recursion=recursion, n_kv_head=1))
    vision, question, answer = sample()
    context = decoder.read_context(vision, question)
    calls = []  # the attention, what goes in and what comes out
    for block in decoder.blocks:
        block.attention.register_forward_hook(lambda *call: calls.append(call))
    seen = passes.attention_of(decoder, context, answer)
    assert len(seen) == len(calls) >= decoder.config.n_layer * decoder.config.inner_steps
    for att, (module, (h, rope, _, past), (out, _)) in zip(seen, calls):
        values = torch.cat([past[1], module.queries_keys_values(h, rope)[2]], dim=2)   # (B, kv, S + T, hs)
        values = values.repeat_interleave(att.size(1) // values.size(1), dim=1)        # (B, nh, S + T, hs)
        again = module.out((att @ values).transpose(1, 2).flatten(2))                  # (B, T, C)
        assert torch.allclose(again, out, atol=1e-5)
    assert not any(block.attention._forward_pre_hooks for block in decoder.blocks)


@pytest.mark.parametrize('recursion', RECURSIONS)
@pytest.mark.parametrize('cycles', [1, 2])
def test_passes_are_the_decoders(recursion, cycles):
    """What a pass would say is what a decoder of so many passes says, with its probabilities; how far it moved is the difference of
    its states from those of a pass less; looking leaves the decoder as it was."""
    decoder = decoder_of(dict(recursion=recursion, inner_steps=3, outer_steps=cycles))
    vision, question, _ = (t[:1] for t in sample())
    tokenizer = SimpleNamespace(bos_id=1, eos_id=2, pad_id=0, piece=lambda id: f' {id}')
    seen = passes.passes_of(decoder, vision, question, tokenizer)
    assert 'network' not in vars(decoder)
    assert len(seen) == cycles * (3 + (recursion == 'add'))
    start = torch.tensor([[1]])
    logits = decoder(vision, question, start)[0][0, 0]
    best = logits.argmax().item()
    word = {0: '(mark)', 1: '(mark)', 2: '(end)'}.get(best, str(best))
    assert seen[-1].guesses[0][0] == word and seen[-1].guesses[0][1] == pytest.approx(logits.softmax(-1).max().item())
    if recursion == 'add':
        assert [bool(one.guesses) for one in seen] == cycles * [False, False, False, True]
    else:
        context = decoder.read_context(vision, question)
        if cycles == 1:
            y = [decoder.answer_states(context, start, inner_steps=n)[-1] for n in (1, 2, 3)]
            assert seen[1].moved['y'] == pytest.approx(((y[1] - y[0]).norm() / y[1].norm()).item(), rel=1e-6)
            assert seen[0].guesses[0][1] == pytest.approx(decoder.head(y[0]).softmax(-1).max().item())
        assert set(seen[0].moved) == {'y', 'z'} if recursion == 'concat' else {'y'}
    assert all(one.looked.sum().item() == pytest.approx(1, abs=1e-5) for one in seen)


@pytest.mark.parametrize('recursion', RECURSIONS)
@torch.no_grad()
def test_scores_by_depth(recursion):
    """Answers that a decoder itself gives with three passes are all right with three, and not all with another number; captions are left out."""
    decoder = decoder_of(dict(recursion=recursion, inner_steps=3))
    decoder.config.eos_id = -1
    vision, question, _ = sample(B=12)
    targets = decoder.generate(vision, question, 4)
    answer = torch.cat([torch.full((12, 1), 1), targets[:, :-1]], dim=1)
    targets[3:, 2:] = -100  # shorter ones
    types = ['describe', *'aaaaabbbbbb']

    def batch(rows):
        return dict(picture=rows, question=question[rows], answer=answer[rows], targets=targets[rows])
    tokens_of = lambda batch: (vision[batch['picture']], None)
    questions = SimpleNamespace(batch=batch, rows=SimpleNamespace(type=types), rows_in_order=lambda size, most: torch.arange(most).split(size))
    scores = depths.scores_by_depth(decoder, questions, tokens_of, 'cpu', [1, 3, 8], 5, 12)
    assert list(scores) == ['a', 'b', 'all'] and all(of_type[3] == 1 for of_type in scores.values())
    assert all(scores['all'][n] == (5 * scores['a'][n] + 6 * scores['b'][n]) / 11 for n in (1, 8))
    assert scores['all'][1] < 1
    if recursion != 'add':  # what halting never ends is what all passes give; what it ends at once is two passes
        halting = depths.scores_by_halt(decoder, questions, tokens_of, 'cpu', [1e-9, 1e9], 5, 12)
        two = depths.scores_by_depth(decoder, questions, tokens_of, 'cpu', [2], 5, 12)
        assert all(halting[type] == {1e-9: (3, 1), 1e9: (2, two[type][2])} for type in 'ab') and two['all'][2] < 1


def test_looking_into_a_run(tiny_shapes, tiny_encoder, tmp_path, capsys):
    """The programs of lab look into a run and leave its files as they are; forgetting a state matters, but not before the first pass."""
    import train
    out = tmp_path / 'run'
    flags = [*TINY, f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache']
    train.main([*flags, f'--out_dir={out}'])
    before = (out / 'metrics.json').read_bytes()
    capsys.readouterr()
    tables = []
    for more in (['--forget=y'], ['--forget=z'], ['--forget=y', '--inner_steps=1'], ['--forget=z', '--inner_steps=1']):
        states.main([f'--out_dir={out}', '--device=cpu', *more])
        tables.append(capsys.readouterr().out)
    assert tables[0] != tables[1] and tables[2] == tables[3]
    states.main([f'--out_dir={out}', '--device=cpu'])
    assert 'after pass 64: RMS of y 1.00, RMS of z 1.00' in capsys.readouterr().out
    passes.main([f'--out_dir={out}', '--device=cpu', '--inner_steps=3'])
    told = capsys.readouterr().out
    assert (out / 'passes.png').stat().st_size > 1000 and (out / 'metrics.json').read_bytes() == before
    assert told.count('pass  1 |') == told.count('pass  3 |') == 4 and 'pass  4' not in told
    depths.main([f'--out_dir={out}', '--device=cpu', '--passes=3,1', '--most=40', '--halts=0.1,0.4'])
    told = capsys.readouterr().out
    assert re.search(r'\| +passes \| +1 \| +3 \|', told) and re.search(r'^\| +all \| [01]\.\d{3} \|', told, re.MULTILINE) and (out / 'depths.png').stat().st_size > 1000
    (out / 'passes.png').unlink()
    passes.main([f'--out_dir={out}', '--device=cpu', f'--image={out}/samples.png', '--question=What is it?'])
    told = capsys.readouterr().out
    assert 'What is it? | says: ' in told and told.count('| y moved ') == 2 and 'true:' not in told and (out / 'passes.png').is_file()
    demo.main([f'--out_dir={out}', f'--html={tmp_path}/passes.html', '--device=cpu'])
    assert (tmp_path / 'passes.html').read_text().count('<figure') == 12
    train.main([*flags, f'--out_dir={tmp_path / "plain"}', '--kind=plain'])
    with pytest.raises(ValueError, match='plain decoder'):
        states.main([f'--out_dir={tmp_path / "plain"}', '--device=cpu'])
    with pytest.raises(ValueError, match='plain decoder'):
        depths.main([f'--out_dir={tmp_path / "plain"}', '--device=cpu'])
    with pytest.raises(ValueError, match='no y and z side by side'):
        states.main([f'--out_dir={tmp_path / "plain"}', '--device=cpu', '--forget=z'])
    capsys.readouterr()
    compare_main([str(out), f'{tmp_path / "plain"},{out}'])
    assert ' ± ' not in capsys.readouterr().out.splitlines()[2]


def test_which_pass_follows_which_swap(tiny_encoder, tmp_path, capsys):
    """Places are told back to front and agree with the answers; tokens of a swap are found; a probe reads what stands in the states, and only that; the table is printed."""
    import train
    from prepare.shapes import Config as ShapesConfig
    from prepare.shapes import draw_shapes
    data = tmp_path / 'swaps'
    draw_shapes(ShapesConfig(out=str(data), types='swaps', n_train=60, n_val=8, n_test=8, min_objects=4, max_objects=4, max_swaps=3, describe=0, asked=1))
    rows = read_rows(data, 'train')
    colors = {}  # of the places, by picture, from the questions without a swap
    for i in range(len(rows)):
        colors.setdefault((rows.picture[i], lab_swaps.places_of(rows.question[i])[-1]), set()).update(rows.references[i])
    assert all(len(of_place) == 1 for of_place in colors.values()) and len(colors) > 150
    assert lab_swaps.places_of('swap 1 3, 3 2: what color is number 2?') == [2, 3, 1] and lab_swaps.places_of('what color is number 4?') == [4]
    words = ['swap', '1', '3', ',', '3', '2', ':', 'what', 'number', '2', '?']
    assert lab_swaps.swap_of_token(words, 2) == [-1, 1, 1, -1, 0, 0, -1, -1, -1, -1, -1]
    torch.manual_seed(0)
    places = torch.randint(0, 4, (400, 2))
    states_of_two = torch.randn(2, 400, 8)
    states_of_two[1, :, :4] += 3 * torch.eye(4)[places[:, 1]]
    shares = lab_swaps.readable(states_of_two, places)
    assert shares[1, 1] > .9 and max(shares[0, 0], shares[0, 1], shares[1, 0]) < .4
    out = tmp_path / 'run'
    train.main([*TINY, f'--dataset={data}', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache', f'--out_dir={out}'])
    capsys.readouterr()
    lab_swaps.main([f'--out_dir={out}', '--device=cpu', '--inner_steps=2', '--swaps=2'])
    told = capsys.readouterr().out
    assert '120 stories of 2 swaps, train' in told and len(re.findall(r'^\| +[12] \| +[01]\.\d\d \|', told, re.MULTILINE)) == 2
    with pytest.raises(ValueError, match="has 0 rows of type '7 swaps'"):
        lab_swaps.main([f'--out_dir={out}', '--device=cpu', '--swaps=7'])


@pytest.mark.parametrize('main, argv, message', [
    (states.main, '--forget=x', 'forget=x: expected y or z'), (states.main, '--split=tset', 'split=tset'),
    (states.main, '--inner_steps=2', '--inner_steps goes with --forget'),
    (states.main, '--fresh=true --forget=y', '--forget and --fresh: one at a time'),
    (passes.main, '--split=tset', 'split=tset'), (depths.main, '--split=tset', 'split=tset'), (depths.main, '--passes=1,x', 'passes=1,x: expected whole numbers'), (depths.main, '--most=0', 'most=0'), (depths.main, '--halts=0.1,x', 'halts=0.1,x: expected numbers above 0'), (passes.main, '--image=cat.png', '--image and --question belong together'), (passes.main, '--inner_steps=0', 'inner_steps=0'),
    (guess.main, '--split=tset', 'split=tset'), (guess.main, '--dataset=/nowhere', 'no such file; a dataset is a folder'), (compare_main, '', 'which runs'),
    (compare_main, '/nowhere', 'none/metrics.json: no such file|nowhere/metrics.json: no such file; lab.compare takes'), (states.main, '--out_dir=/nowhere', 'no such file; a run writes it')])
def test_mistakes(main, argv, message, monkeypatch, capsys):
    """A mistake is one line that says what was wrong."""
    monkeypatch.setattr(sys, 'argv', ['lab', *argv.split()])
    with pytest.raises(SystemExit) as end:
        run_script(main)
    text = capsys.readouterr().err
    assert end.value.code == 1 and text.count('\n') == 1 and re.search(message, text), text
