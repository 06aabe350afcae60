"""A recorded step: as the plain one to the last digit, on a tape that is as strict as a CUDA graph."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tape import OnTape, Tape
from torch import nn
from torch.utils.checkpoint import checkpoint

import eval as evaluation
import train
from configurator import configure
from model import Halting, ModelConfig, build_model
from plumbing.graphs import Captured, Writer
from plumbing.run import read_checkpoint, read_log

LEARNING_RATES = [.01 / (1 + k) for k in range(12)]


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, words, passes, mask=None):
        h = self.words(words)
        if mask is not None:
            h = h * mask[..., None]
        for _ in range(passes):
            scores = (h @ h.mT).softmax(-1)
            h = self.norm(h + F.dropout(scores @ F.gelu(self.inner(h)), .1))
        return self.head(h)


class Training:
    """What a step changes, and the step. `way`: what is done differently in it."""

    def __init__(self, dtype=torch.float32, way=None):
        torch.manual_seed(0)
        self.net = Net()
        self.average = copy.deepcopy(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=torch.tensor(0.), fused=True, capturable=True)
        self.dtype = dtype
        self.way = way
        self.calls = 0
        self.lr = 0.  # a float, which a recording does not follow

    def step(self, tensors, passes=2):
        self.calls += 1
        loss = 0
        for batch in tensors['batches']:
            with torch.autocast('cpu', self.dtype, enabled=self.dtype != torch.float32):
                logits = self.net(batch['words'], passes, batch.get('mask'))
                part = F.cross_entropy(logits.flatten(0, 1), batch['targets'].flatten(), ignore_index=-1)
            part.backward()
            loss = loss + part.detach()
        gnorm = nn.utils.clip_grad_norm_(self.net.parameters(), .5)
        finite = (loss + gnorm).isfinite()
        if self.way == 'item':
            finite = torch.tensor(bool(finite))
        self.optimizer.found_inf = 1 - finite.float()
        self.optimizer.grad_scale = None
        self.optimizer.param_groups[0]['lr'] = self.lr if self.way == 'float' else tensors['lr'] * 1.
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            weights, averages = list(self.net.parameters()), list(self.average.parameters())
            moved = torch._foreach_lerp(averages, weights, .1)
            for average, new in zip(averages, moved):
                average.copy_(torch.where(finite, new, average))
        return torch.stack([loss, gnorm])

    def tensors(self):
        state = [s[key] for s in self.optimizer.state.values() for key in sorted(s)]
        return [*self.net.parameters(), *self.average.parameters(), *state]


def batch(k, length):
    generator = torch.Generator().manual_seed(k)
    words = torch.randint(11, (2, 3, length), generator=generator)
    return dict(words=words[0], targets=words[1])


def inputs(k, length):
    """Those of step k: two micro-batches and a rate."""
    return dict(batches=[batch(2 * k, length), batch(2 * k + 1, length)], lr=torch.tensor(LEARNING_RATES[k]))


def trained(training, step, n=12, lengths=(4, 6)):
    """What n steps return, the batches of several lengths in turn."""
    results = []
    torch.manual_seed(1)  # of the dropout
    for k in range(n):
        training.lr = LEARNING_RATES[k]
        results.append(step(inputs(k, lengths[k % len(lengths)])))
    return results


def both(n=12, lengths=(4, 6), **kwargs):
    """The plain training and the recorded one, and their results."""
    plain, recorded = Training(**kwargs), Training(**kwargs)
    captured = Captured(recorded.step, 'cpu', recorder=OnTape())
    return plain, recorded, trained(plain, plain.step, n, lengths), trained(recorded, captured, n, lengths)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_recorded_is_plain(dtype):
    """Weights, their average, the optimizer and the results are those of the plain step, every call is one step, and Python runs in the first two of a shape."""
    plain, recorded, a, b = both(dtype=dtype)
    assert same(a, b) and same(plain.tensors(), recorded.tensors())
    assert (plain.calls, recorded.calls) == (12, 4)
    # the claim is worth something: all results differ, and the weights have moved
    assert len({result[0].item() for result in a}) == 12 and not same(plain.tensors()[:1], Training().tensors()[:1])
    steps = {s['step'].item() for s in recorded.optimizer.state.values()}
    assert steps == {12}


def test_not_finite():
    """A step whose gradient is not finite moves nothing, in a recording too, and the next one is as if it had not been."""
    training = Training()
    captured = Captured(training.step, 'cpu', recorder=OnTape())
    with_mask = lambda k, value: dict(inputs(k, 4), batches=[dict(batch(k, 4), mask=torch.full((3, 4), value))])
    for k in range(3):
        captured(with_mask(k, 1.))
    before = [t.clone() for t in training.tensors()]
    assert not captured(with_mask(3, float('nan'))).isfinite().any() and same(before, training.tensors())
    assert captured(with_mask(4, 1.)).isfinite().all() and not same(before, training.tensors())
    assert training.calls == 2


def test_recording_executes_nothing():
    """A tape alone leaves weights, states and random numbers as they were, and no result."""
    training = Training()
    training.step(inputs(0, 4))
    before, generator = [t.clone() for t in training.tensors()], torch.get_rng_state()
    with Tape() as tape:
        result = training.step(inputs(1, 4))
    assert same(before, training.tensors()) and torch.equal(generator, torch.get_rng_state()) and result.isnan().all()
    tape.replay()
    assert not same(before, training.tensors()) and not torch.equal(generator, torch.get_rng_state()) and result.isfinite().all()


def test_a_number_of_python_is_stuck():
    """The tape is honest: a learning rate that is a float stays what it was when the step was recorded, so that the weights go astray."""
    plain, recorded, a, b = both(way='float', lengths=(4,))
    # the first two steps are right, the third moves by the second one's rate, which the fourth result shows
    assert same(a[:3], b[:3]) and not torch.allclose(a[3], b[3], atol=1e-6)
    assert not torch.allclose(plain.net.head.weight, recorded.net.head.weight, atol=1e-4)


def test_waiting_is_refused():
    """A step that reads .item() runs once and is refused when it is recorded, without a trace of that."""
    training = Training(way='item')
    captured = Captured(training.step, 'cpu', recorder=OnTape())
    captured(inputs(0, 4))
    before = [t.clone() for t in training.tensors()]
    with pytest.raises(RuntimeError, match='the host waits for the device'):
        captured(inputs(1, 4))
    assert same(before, training.tensors())


X = torch.tensor([1., 0., 2.])


@pytest.mark.parametrize('run', [
    lambda: X.sum().item(), lambda: bool(X[0] > 0), lambda: X.tolist(), lambda: X.cpu(), lambda: X.numpy(), lambda: X.nonzero(), lambda: X.unique(), lambda: X[X > 0],
    lambda: X.masked_select(X > 0), lambda: torch.equal(X, X), lambda: X.clone().index_put_((X > 0,), X[:2]), lambda: X.repeat_interleave(X.long()),
    lambda: torch.tensor([1.], device='cpu'), lambda: X.long().bincount(), lambda: torch.linalg.inv(torch.eye(2))])
def test_what_waits(run):
    with pytest.raises(RuntimeError, match='the host waits for the device'), Tape():
        run()


def test_what_else_is_refused():
    """What CUDA refuses beside that: checkpoint() that keeps the generator's state, and an optimizer that is not told of graphs."""
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match='random generator'), Tape():
        checkpoint(torch.sin, w, use_reentrant=False)
    with Tape():
        checkpoint(torch.sin, w, use_reentrant=False, preserve_rng_state=False).sum().backward()
    optimizer = torch.optim.AdamW([w], fused=True)
    with pytest.raises(RuntimeError, match='capturable'), Tape():
        optimizer.step()


def test_what_does_not_wait():
    """A mask that is filled with one value, constants, views written to, random numbers: replayed as they are run."""
    x = X.clone()
    total = torch.zeros(3)

    def run():
        y = x.clone()
        y[y == 0] = 5.
        y.view(3, 1)[1:] += torch.ones(2, 1)
        total.add_(y).add_(torch.rand(3))
        # its mean and variance are written to and its result is new
        F.batch_norm(y[:, None], total[:1], total[1:2], training=True)
        return y.split([1, 2])[1] * 1.

    torch.manual_seed(0)
    expected = [run().clone() for _ in range(3)], total.clone()
    total.zero_()
    torch.manual_seed(0)
    with Tape() as tape:
        result = run()
    results = []
    for _ in range(3):
        tape.replay()
        results.append(result.clone())
    assert same(results, expected[0]) and torch.equal(total, expected[1])
    x += 1
    tape.replay()
    assert result.tolist() == [2., 4.]


def test_replayed_as_recorded():
    """An autocast around the replay changes nothing: the casts are part of the recording."""
    x = torch.rand(8, 8)
    with Tape() as tape:
        result = x @ x
    with torch.autocast('cpu', torch.bfloat16):
        tape.replay()
    assert torch.equal(result, x @ x)


def test_keys(capsys):
    """A None, another dtype, structure or setting is another recording. At most `max_graphs` are kept, which is said once; steps of further keys run as they are."""
    ones = torch.ones(2)
    calls = []

    def step(tensors, *settings):
        calls.append(settings)
        total = torch.zeros(())
        for tensor in tensors['x']:
            total = total + (100. if tensor is None else tensor.sum())
        return total * (settings[0] if settings else 1)

    captured = Captured(step, 'cpu', max_graphs=7, recorder=OnTape())
    keys = [([ones], ()), ([None], ()), ([ones, None], ()), ([None, ones], ()), ([ones.long()], ()), ([ones], (2,)), ([ones], (3,)), ([ones[:1]], ()), ([ones[:0]], ())]
    for round in range(4):
        for x, settings in keys:
            x = [None if t is None else t + round for t in x]
            expected = step(dict(x=x), *settings)
            assert captured(dict(x=x), *settings) == expected
    # the step itself has run 4 times a key for what is expected, and 4 times with a key that came too late
    assert len(calls) == 4 * 9 + 7 * 2 + 2 * 4 and len(captured.recorded) == 7
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and 'fewer shapes' in said[0]


def test_results_stay():
    """What a call returns is the caller's: no later call changes it, and what the caller does to it changes no later one. The inputs stay the caller's too."""
    total = torch.zeros(2)
    captured = Captured(lambda tensors: total.add_(tensors['x']), 'cpu', recorder=OnTape())
    given = [torch.full((2,), float(k)) for k in range(5)]
    results = []
    for x in given:
        results.append(captured(dict(x=x)))
    assert [r.tolist() for r in results] == [[k] * 2 for k in (0., 1., 3., 6., 10.)]
    assert [x.tolist() for x in given] == [[k] * 2 for k in (0., 1., 2., 3., 4.)]
    results[-1].zero_()
    assert captured(dict(x=given[1])).tolist() == [11., 11.]


# ----------------------------------------------------------------------------
# the training itself

@pytest.mark.parametrize('more', [[], ['--min_inner_steps=1', '--inner_steps=3'], ['--train_encoder=true', '--grad_accum=2', '--optimizer=adamw'],
                                  ['--kind=plain', '--dtype=float16', '--ema=0'], ['--recursion=add', '--checkpoint_recursion=true']], ids=' '.join)
def test_training_as_graphs(more, tiny_shapes, tiny_encoder, tmp_path, monkeypatch):
    """Training whose steps are recorded and replayed ends with the weights of the same training without it, and left the same bad step out."""
    monkeypatch.setattr(train, 'judge_test_split', lambda *args: None)
    monkeypatch.setattr(train, 'uses_graphs', lambda s, device: s.graphs)  # on a CPU too
    monkeypatch.setattr(train, 'reads_results', lambda step, s, device, stop: train.is_due(step, s))
    fetch, fetched, replayed = train.ContextTokens.fetch, [], []

    def bad_once(self, batch):
        fetched.append(fetch(self, batch))
        if len(fetched) == 20 and fetched[-1]['picture'].is_floating_point():
            fetched[-1]['picture'] *= math.nan
        return fetched[-1]

    class Watched(OnTape):
        def record(self, run):
            replay, result = super().record(run)
            return lambda: (replayed.append(1), replay()), result

    monkeypatch.setattr(train.ContextTokens, 'fetch', bad_once)
    flags = [f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache', '--device=cpu', '--n_embd=16', '--n_head=2', '--inner_steps=2',
             '--max_steps=24', '--eval_interval=24', '--batch_size=8', '--max_question_tokens=40',
             '--skip_bad_steps=1', *more]
    ends = []
    for name, made in (('graphs', lambda learn, device: Captured(learn, device, recorder=Watched())), ('plain', lambda learn, device: learn)):
        fetched.clear()
        monkeypatch.setattr(train, 'Captured', made)
        train.main([*flags, f'--out_dir={tmp_path / name}'])
        ends.append(read_checkpoint(tmp_path / name))
    assert len(replayed) > 4
    a, b = ends
    assert a['run']['bad_steps'] == b['run']['bad_steps'] == ('--train_encoder=true' not in more)
    assert all(same(a['state'][part].values(), b['state'][part].values()) for part in ('model', 'ema'))
    assert log_of(tmp_path / 'graphs') == log_of(tmp_path / 'plain')


RMS = dict(norm='rms', n_layer=3, n_kv_head=2, tied_head=False)
WRITERS = [dict(kind='plain'), dict(inner_steps=3), dict(inner_steps=2, outer_steps=2, norm='pre', prefix_lm=False), dict(recursion='add', inner_steps=2), dict(recursion='loop', recall=False),
           RMS | dict(kind='plain'), RMS | dict(inner_steps=2), RMS | dict(inner_steps=2, recur_layers=2), RMS | dict(recursion='loop', inner_steps=3, recur_layers=1)]


def written_about(k, B=3, Q=5):
    """The k-th pictures and questions, padded."""
    generator = torch.Generator().manual_seed(k)
    vision = torch.randn(B, 4, 8, generator=generator, dtype=torch.float64)
    question = torch.randint(3, 40, (B, Q), generator=generator)
    question[0, 2 + k % 3:] = 0
    return vision, question


@pytest.mark.parametrize('settings', WRITERS, ids=lambda s: '-'.join(map(str, s.values())))
@torch.no_grad()
def test_written_as_graphs(settings):
    """Tokens that a recording writes are those of plain generation, and so are their logits, for batches of two shapes in turn, the last of them not whole; Python runs in two tokens of a shape."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=40, n_head=4, n_embd=16, vision_dim=8, eos_id=-1, **settings)).double()
    for p in decoder.parameters():  # large, so that rows differ, and passes too
        nn.init.normal_(p, std=.5)
    calls, logits = [], []

    def counted(context, cache, token):
        calls.append(tuple(token.shape))
        return decoder.next_logits(context, cache, token)

    def watched(next_logits, token):
        logits.append(next_logits(token))
        return logits[-1]

    writer = Writer(counted, 'cpu', recorder=OnTape())
    begin = writer.begin
    writer.begin = lambda *args: partial(watched, begin(*args))
    said = set()
    for k, (B, Q) in enumerate([(3, 5), (3, 5), (2, 7), (3, 5), (2, 7)]):
        about = written_about(k, B, Q)
        expected = decoder.generate(*about, 6)
        logits.clear()
        assert torch.equal(decoder.generate(*about, 6, writer=writer), expected)
        whole, _ = decoder(*about, F.pad(expected[:, :-1], (1, 0), value=1))
        assert torch.allclose(torch.stack(logits, dim=1), whole.float(), atol=1e-5)
        said.update(map(tuple, expected.tolist()))
    assert calls == [(3, 1)] * 2 + [(2, 1)] * 2
    assert len(said) > 6  # pictures and questions matter


def test_judged_as_graphs(tiny_shapes, tiny_encoder, tmp_path, monkeypatch):
    """What a run says of the test split is the same with recordings, after training and by eval.py; a flag goes without."""
    made = []

    def writer_of(decoder, device):
        made.append(Writer(decoder.next_logits, device, recorder=OnTape()))
        return made[-1]

    def talkative(*args, new=train.new_decoder):  # else all answers of so short a training are the same
        decoder = new(*args)
        for p in decoder.parameters():
            nn.init.normal_(p, std=.5)
        return decoder

    monkeypatch.setattr(train, 'new_decoder', talkative)
    flags = [f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache', '--device=cpu', '--n_embd=16', '--n_head=2', '--max_steps=1', '--learning_rate=1e-9', '--truncate=true', '--max_answer_tokens=6',
             '--batch_size=8', '--max_question_tokens=40']
    train.main([*flags, f'--out_dir={tmp_path}/plain'])
    monkeypatch.setattr(train, 'writer_of', writer_of)
    monkeypatch.setattr(evaluation, 'writer_of', writer_of)
    train.main([*flags, f'--out_dir={tmp_path}/run'])
    expected = answers_of(tmp_path / 'plain')
    assert answers_of(tmp_path / 'run') == expected and len(set(expected)) > 9 and len(made) == 1
    for n, more in ((2, []), (2, ['--graphs=false']), (2, ['--halt=.01', '--split=val'])):
        evaluation.main([f'--out_dir={tmp_path}/run', '--device=cpu', *more])
        assert answers_of(tmp_path / 'run') == expected and len(made) == n
    assert all(writer.kept for writer in made)


def answers_of(out_dir):
    return [json.loads(line)['prediction'] for line in (out_dir / 'predictions.jsonl').read_text().splitlines()]


@torch.no_grad()
def test_shapes_that_are_kept():
    """The oldest shape makes room for a new one, and comes back; another length of answers is a shape of its own; sampling draws the same; what was not finite stays behind."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=40, n_embd=16, vision_dim=8)).double()
    nn.init.normal_(decoder.embed.weight)
    writer = Writer(decoder.next_logits, 'cpu', most=2, recorder=OnTape())
    for k, Q in enumerate((3, 4, 5, 3, 3)):
        about = written_about(k, Q=Q)
        assert torch.equal(decoder.generate(*about, 4, writer=writer), decoder.generate(*about, 4))
        assert len(writer.kept) <= 2
    vision, question = written_about(1, Q=3)
    decoder.generate(vision * math.nan, question, 4, writer=writer)
    writer.begin(decoder.read_context(*written_about(2, Q=3)), 9)  # and nothing was asked
    for length in (4, 1, 9):
        expected = decoder.generate(vision, question, length)
        assert torch.equal(decoder.generate(vision, question, length, writer=writer), expected)
    drawn = [decoder.generate(vision, question, 9, 1., 5, torch.Generator().manual_seed(3), writer=way) for way in (None, writer)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], expected)


@torch.no_grad()
def test_interrupted_while_writing(monkeypatch):
    """What was interrupted in the middle of a token, while it is recorded too, spoils no later answer; under autocast, or with another cache, nothing is written."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=40, n_embd=16, vision_dim=8)).double()
    nn.init.normal_(decoder.embed.weight)
    forward, about = type(decoder.blocks[1]).forward, written_about(0)
    expected = decoder.generate(*about, 6)
    for at in range(24):  # two blocks, four passes, three tokens: the first, the recorded, the replayed
        calls, writer = [], Writer(decoder.next_logits, 'cpu', recorder=OnTape())
        decoder.read_context(*about)

        def failing(*args, **more):
            calls.append(1)
            if len(calls) == at + 2:  # one call is for the context
                raise KeyboardInterrupt
            return forward(*args, **more)

        monkeypatch.setattr(type(decoder.blocks[1]), 'forward', failing)
        for _ in range(3):
            try:
                answer = decoder.generate(*about, 6, writer=writer)
            except KeyboardInterrupt:
                continue
            assert torch.equal(answer, expected), at
    with pytest.raises(RuntimeError, match='under autocast'), torch.autocast('cpu', torch.bfloat16):
        decoder.float().generate(about[0].float(), about[1], 6, writer=writer)
    with pytest.raises(ValueError, match='cache of its own'):
        decoder.generate(*about, 6, writer=writer, cache=Halting(.1))


def test_where_graphs_are_used(monkeypatch):
    """On one GPU, unless a flag says no, or steps are compiled."""
    def uses(*flags, device='cuda:1'):
        return train.uses_graphs(configure(train.TrainConfig, [*flags])[0], device)
    assert uses() and uses(device='cuda')
    assert not uses(device='cpu') and not uses('--graphs=false') and not uses('--compile=true')
    monkeypatch.setattr(train, 'alone', lambda: False)
    assert not uses()


def log_of(out_dir):
    """What a run's steps were like, without its clock."""
    return [[event.get(key) for key in ('step', 'loss', 'gnorm', 'lr', 'em', 'problem')] for event in read_log(out_dir)]
