"""model.py: the invariants of both decoders and all three recursions, in float64 wherever equality is claimed."""

import math

import pytest
import torch

from lab.naive import naive_logits
from model import RECURSIONS, Cache, Halting, ModelConfig, build_model, cross_entropy

V, N, Q, A = 40, 5, 6, 7
PAD, BOS, EOS = 0, 1, 2
DECODERS = [dict(kind='plain', n_layer=3, norm='pre'), dict(kind='plain', norm='post')]
for recursion in RECURSIONS:  # whoever adds one finds it here
    DECODERS += [dict(recursion=recursion, inner_steps=1, norm='pre'), dict(recursion=recursion, inner_steps=3, norm='pre'),
                 dict(recursion=recursion, inner_steps=2, norm='post'), dict(recursion=recursion, inner_steps=2, outer_steps=2, norm='pre'),
                 dict(recursion=recursion, inner_steps=2, outer_steps=2, norm='post', deep_supervision=True)]
DECODERS += [dict(recursion='concat', inner_steps=2, norm='post', n_kv_head=1), dict(recursion='add', inner_steps=2, norm='pre', n_kv_head=2),
             dict(kind='plain', norm='pre', n_kv_head=1)]  # heads that share their keys and values
DECODERS += [dict(recursion='concat', inner_steps=2, norm='post', qk_norm=False), dict(kind='plain', norm='pre', qk_norm=False)]
DECODERS += [dict(recursion='concat', inner_steps=3, norm='post', recall=False), dict(recursion='loop', inner_steps=3, norm='pre', recall=False)]
CONCAT = dict(recursion='concat', inner_steps=3, norm='pre')
every_decoder = pytest.mark.parametrize('settings', DECODERS, ids=lambda s: '-'.join(map(str, s.values())))
every_mask = pytest.mark.parametrize('prefix_lm', [True, False], ids=['prefix', 'causal'])


def decoder_of(settings, **more):
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=V, n_head=4, n_embd=16, vision_dim=8, **settings, **more)).double()
    for p in decoder.parameters():  # larger weights than at the start, so that every path carries something
        torch.nn.init.normal_(p, std=.3)
    return decoder


def sample(B=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    vision = torch.randn(B, N, 8, generator=g, dtype=torch.float64)
    question, answer = (torch.randint(3, V, (B, T), generator=g) for T in (Q, A))
    answer[:, 0] = BOS
    return vision, question, answer


@every_decoder
@every_mask
def test_no_leak(settings, prefix_lm):
    """The logits that predict answer token t do not change when token t or any later one does, and earlier ones do matter."""
    decoder = decoder_of(settings, prefix_lm=prefix_lm)
    vision, question, answer = sample()
    before, _ = decoder(vision, question, answer)
    for t in range(1, A):  # the input at t is the target of position t - 1
        other = answer.clone()
        other[:, t:] = (other[:, t:] - 3 + 11) % (V - 3) + 3
        after, _ = decoder(vision, question, other)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t:], after[:, t:])


@every_decoder
@every_mask
def test_everything_lives(settings, prefix_lm):
    """The gradient reaches z's start, every image token and every question token. With several cycles the first ones run
    without gradient, so there z's start matters but is not trained, as in the paper."""
    decoder = decoder_of(settings, prefix_lm=prefix_lm)
    vision, question, answer = sample()
    vision.requires_grad_()
    embedded = []  # of the question, then of the answer; the weights themselves are tied with the head, which would hide a dead end
    hook = decoder.embed.register_forward_hook(lambda module, args, out: (out.retain_grad(), embedded.append(out)) and None)
    logits, _ = decoder(vision, question, answer)
    logits.square().sum().backward()
    hook.remove()
    assert (vision.grad.abs().amax(2) > 0).all()
    assert (embedded[0].grad.abs().amax(2) > 0).all()
    if not hasattr(decoder, 'z_start'):
        assert decoder.config.kind == 'plain' or decoder.config.recursion == 'loop'
    elif decoder.config.outer_steps == 1:  # also true with deep supervision and one cycle
        assert decoder.z_start.grad.abs().max() > 1e-9
    else:
        decoder.z_start.data = -decoder.z_start
        assert not torch.allclose(decoder(vision, question, answer)[0], logits)


@every_decoder
@every_mask
def test_context_once(settings, prefix_lm):
    """Running the context once equals recomputing it in every step, the naive loop over [x | stream] with one mask, and so do the gradients: nothing is cut off."""
    decoder = decoder_of(settings, prefix_lm=prefix_lm)
    vision, question, answer = sample()
    question[1, 4:] = PAD
    (fast, _), naive = decoder(vision, question, answer), []
    for logits, v, q, a in zip(fast, vision, question, answer):  # the naive loop knows no padding
        slow = naive_logits(decoder, v[None], q[None, q != PAD], a[None])[0]
        assert torch.allclose(logits, slow, atol=1e-10, rtol=0)
        naive.append(slow)
    grads = [torch.autograd.grad(torch.stack(list(l)).sin().sum(), list(decoder.parameters()), materialize_grads=True) for l in (fast, naive)]
    assert all(torch.allclose(a, b, atol=1e-9, rtol=1e-9) for a, b in zip(*grads))


@every_decoder
@every_mask
@torch.no_grad()
def test_cache_is_exact(settings, prefix_lm):
    """Logits from one position at a time, with the keys and values before it kept, equal those of the whole answer at once, for rows
    of different lengths."""
    decoder = decoder_of(settings, prefix_lm=prefix_lm)
    vision, question, answer = sample()
    question[1, 4:], question[2, 1:] = PAD, PAD
    whole, _ = decoder(vision, question, answer)
    context = decoder.read_context(vision, question)
    cache = Cache()
    for t in range(A):
        y = decoder.answer_states(context, answer[:, t:t + 1], cache)[-1]
        assert torch.allclose(decoder.head(y)[:, 0], whole[:, t], atol=1e-10, rtol=0)


@every_decoder
def test_checkpointing_changes_nothing(settings):
    """checkpoint_recursion keeps less for the backward pass of a TRM and gives the same loss and the same gradients."""
    grads, kept = [], []
    for recompute in (False, True):
        decoder = decoder_of(settings, checkpoint_recursion=recompute)
        vision, question, answer = sample()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            _, loss = decoder(vision, question, answer, answer.roll(-1, dims=1))
        kept.append(sum(sizes))
        loss.backward()
        grads.append([loss] + [p.grad for p in decoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(*grads))
    assert kept[1] < kept[0] or decoder.config.kind == 'plain'


def test_one_loop_is_plain():
    """recursion='loop' with one step is the plain decoder: the same weights, the same logits. With more it shares its weights over them."""
    plain, loop = decoder_of(dict(kind='plain')), decoder_of(dict(recursion='loop', inner_steps=1, recall=False))
    batch = sample()
    assert plain.state_dict().keys() == loop.state_dict().keys() and torch.equal(plain(*batch)[0], loop(*batch)[0])
    deeper = decoder_of(dict(recursion='loop', inner_steps=2))
    assert deeper.parameter_counts() == loop.parameter_counts() and not torch.allclose(deeper(*batch)[0], loop(*batch)[0])


@pytest.mark.parametrize('recursion', RECURSIONS)
def test_deep_supervision(recursion):
    """Deep supervision trains on every cycle: the loss is the mean over the cycles, each of which is what a decoder with so many cycles
    predicts, and no gradient crosses from one cycle into the one before. Without it the first cycles get none."""
    settings = dict(recursion=recursion, inner_steps=2, outer_steps=2)
    vision, question, answer = sample()
    targets = answer.roll(-1, dims=1)
    one, two = decoder_of(settings | dict(outer_steps=1)), decoder_of(settings)
    deep = decoder_of(settings, deep_supervision=True)
    losses = [d(vision, question, answer, targets)[1] for d in (one, two, deep)]
    assert torch.allclose(losses[2], (losses[0] + losses[1]) / 2, atol=1e-12, rtol=0)
    for d, loss in zip((one, two, deep), losses):
        loss.backward()
    for name, p in deep.named_parameters():
        a, b = one.get_parameter(name).grad, two.get_parameter(name).grad
        assert torch.allclose(p.grad, sum(g for g in (a, b) if g is not None) / 2, atol=1e-12, rtol=0), name


@every_decoder
@every_mask
def test_padding_and_rows(settings, prefix_lm):
    """A padded batch gives what its rows give alone: padding changes nothing and no row sees another."""
    decoder = decoder_of(settings, prefix_lm=prefix_lm)
    vision, question, answer = sample()
    lengths = (6, 3, 1)
    for b, n in enumerate(lengths):
        question[b, n:] = PAD
    together, _ = decoder(vision, question, answer)
    written = decoder.generate(vision, question, 5)
    for b, n in enumerate(lengths):
        alone, _ = decoder(vision[b:b + 1], question[b:b + 1, :n], answer[b:b + 1])
        assert torch.allclose(together[b], alone[0], atol=1e-10, rtol=0)
        assert torch.equal(written[b], decoder.generate(vision[b:b + 1], question[b:b + 1, :n], 5)[0])


@every_decoder
def test_generation_follows_forward(settings):
    """Greedy generation gives, token for token, what the teacher-forced forward pass predicts, and nothing after the
    end token; a temperature near 0 agrees."""
    decoder = decoder_of(settings)
    vision, question, _ = sample()
    decoder.config.eos_id = decoder.generate(vision, question, 6)[1, 0].item()  # a token that is written, so that a row ends early
    written = decoder.generate(vision, question, 6)
    answer = torch.cat([torch.full((3, 1), BOS), written[:, :-1]], dim=1)
    predicted = decoder(vision, question, answer)[0].argmax(-1)
    ended = (written == decoder.config.eos_id).cumsum(1).cumsum(1) > 1  # behind the end token
    assert torch.equal(predicted[~ended], written[~ended])
    assert ended.any() and (written[ended] == PAD).all()
    cold = decoder.generate(vision, question, 6, temperature=1e-4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, written)


def test_sampling():
    """top_k=1 is greedy; a warm draw follows its generator and not the global random state."""
    decoder = decoder_of(CONCAT)
    vision, question, _ = sample()
    assert torch.equal(decoder.generate(vision, question, 6, temperature=1.0, top_k=1), decoder.generate(vision, question, 6))
    draw = lambda seed: decoder.generate(vision, question, 6, temperature=3.0, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@every_decoder
def test_initial_loss(settings):
    """A fresh decoder predicts nothing: its loss is near ln V."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=500, n_embd=64, vision_dim=8, **settings))
    vision, question, answer = sample(B=16)
    targets = torch.randint(3, 500, (16, A))
    _, loss = decoder(vision.float(), question, answer, targets)
    assert abs(loss.item() - math.log(500)) < .15


@every_decoder
def test_learns_by_heart(settings):
    """Eight samples of ragged lengths are learnt and generated back exactly, first token and end token included."""
    torch.manual_seed(0)
    decoder = build_model(ModelConfig(vocab_size=V, n_head=2, n_embd=32, vision_dim=8, **settings))
    vision, question, _ = sample(B=8)
    vision, question = vision.float(), question[:1].repeat(8, 1)  # only the pictures differ
    targets = torch.full((8, 5), -100)
    for b in range(8):
        n = 1 + b % 4
        targets[b, :n] = torch.randint(3, V, (n,))
        targets[b, n] = EOS
    answer = torch.cat([torch.full((8, 1), BOS), targets[:, :-1]], dim=1).where(torch.arange(5) <= (targets >= 0).sum(1, keepdim=True), PAD)
    answer = answer.clamp(min=PAD)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    wanted = targets.where(targets >= 0, PAD)
    for step in range(250):
        if step % 25 == 0 and torch.equal(decoder.generate(vision, question, 5), wanted):
            break
        _, loss = decoder(vision, question, answer, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(decoder.generate(vision, question, 5), wanted)


def test_targets_are_ignored_at_padding():
    """Loss is the mean over the targets that are not -100; what stands in the answer's padding does not matter."""
    decoder = decoder_of(CONCAT)
    vision, question, answer = sample()
    targets = torch.cat([answer[:, 1:], torch.full((3, 1), EOS)], dim=1)
    targets[0, 3:] = -100
    other = answer.clone()
    other[0, 4:] = PAD
    losses = [decoder(vision, question, a, targets)[1] for a in (answer, other)]
    assert torch.allclose(*losses, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_cross_entropy(dtype):
    """The loss is the mean over the targets that count, exact for logits in half precision, whose gradient is not lost before it is scaled."""
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 50, 50257).to(dtype).requires_grad_(), torch.randint(50257, (3, 50))
    targets[1, 5:] = -100
    loss, counted = cross_entropy(logits, targets), targets >= 0
    assert loss.item() == pytest.approx(-logits.detach().double().log_softmax(-1)[counted, targets[counted]].mean().item(), rel=1e-6)
    (loss * 2 ** 16).backward()
    assert (logits.grad[counted] != 0).all() and not logits.grad[~counted].any()
    exact = logits.detach().double().requires_grad_()
    (-exact.log_softmax(-1)[counted, targets[counted]].mean() * 2 ** 16).backward()
    tolerance = 1e-9 if dtype == torch.float64 else .01
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=tolerance, atol=0)


def test_blind():
    """Without vision the picture is not even read, and there is no projection for it."""
    decoder = decoder_of(CONCAT, use_vision=False)
    _, question, answer = sample()
    assert decoder(None, question, answer)[0].shape == (3, A, V)
    assert decoder.parameter_counts()['vision_proj'] == 0


def test_normed_queries_and_keys():
    """However large the weights of queries and keys are, normed they give the same scores, all below the root of the head's size."""
    for settings, same in ((CONCAT, True), (CONCAT | dict(qk_norm=False), False)):
        decoder, batch = decoder_of(settings), sample()
        attention, scores = decoder.blocks[0].attention, []
        weights = attention.attention_weights
        attention.attention_weights = lambda q, k, mask: (scores.append((q @ k.mT).abs().max().item()), weights(q, k, mask))[1]
        before, _ = decoder(*batch)
        with torch.no_grad():
            for block in decoder.blocks:
                block.attention.qkv.weight[:2 * 16] *= 100
        after, _ = decoder(*batch)
        assert torch.allclose(before, after, atol=1e-3) == same and (max(scores) <= 4 ** .5 + 1e-6) == same, scores


@pytest.mark.parametrize('recursion', RECURSIONS)
def test_test_time_depth(recursion):
    """A decoder runs with other numbers of steps and cycles than it was made with: the same weights, another result, and generation
    follows."""
    decoder = decoder_of(dict(recursion=recursion, inner_steps=3))
    vision, question, answer = sample()
    seen = [decoder(vision, question, answer)[0]]
    for key in ('inner_steps', 'outer_steps'):
        setattr(decoder.config, key, 5)
        seen.append(decoder(vision, question, answer)[0])
        first = decoder(vision, question, answer[:, :1])[0].argmax(-1)
        assert not torch.allclose(seen[-1], seen[-2]) and torch.equal(first, decoder.generate(vision, question, 1))


@every_decoder
def test_depth_of_a_call(settings):
    """A call with other passes is what a decoder that was made with them computes, gradients included."""
    if settings.get('kind') == 'plain':
        return
    batch = sample()
    losses, grads = [], []
    for made, asked in ((5, None), (settings['inner_steps'], 5)):
        decoder = decoder_of(settings | dict(inner_steps=made), checkpoint_recursion=asked is not None)
        losses.append(decoder(*batch, batch[2].roll(-1, dims=1), inner_steps=asked)[1])
        losses[-1].backward()
        grads.append([p.grad for p in decoder.parameters() if p.grad is not None])
    assert torch.equal(*losses) and all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(*grads))


def halting_by_hand(decoder, vision, question, n_tokens, halt):
    """One row, written another way: every token's own list of passes, in which what a token has no more stands as it was last. -> tokens, passes"""
    c, context = decoder.config, decoder.read_context(vision, question)
    earlier = []  # of every token, for each of its passes the keys and values of every block
    token, written, taken = c.bos_id, [], []
    for t in range(n_tokens):
        past = lambda k: [tuple(torch.cat([layer[j], *(e[min(k, len(e) - 1)][i][j] for e in earlier)], dim=2) for j in (0, 1)) for i, layer in enumerate(context.layers)]
        own, made, network = [], [], decoder.network

        def watched(states, rope, mask, context, cache):
            if len(made) > 1 and (made[-1] - made[-2]).square().mean().sqrt() < halt:
                return made[-1]
            h, seen = states, []
            for block, layer in zip(decoder.blocks, past(len(own))):
                h, (k, v) = block(h, rope, mask, layer)
                seen.append((k[:, :, layer[0].size(2):], v[:, :, layer[1].size(2):]))
            h = decoder.bounded(h)
            own.append(seen)
            made.append(h)
            return h
        decoder.network = watched
        place = Cache()
        place.positions = t
        y = decoder.answer_states(context, torch.tensor([[token]]), place)[-1]
        decoder.network = network
        token = decoder.head(y)[0, 0].argmax().item()
        written.append(token)
        earlier.append(own)
        taken.append(len(own))
    return written, taken


@pytest.mark.parametrize('recursion', ['concat', 'loop'])
@torch.no_grad()
def test_halting(recursion):
    """Tokens take as many passes as they need, row by row, and later ones read them as they were last: as written another way. A
    threshold that no move reaches changes nothing, one above all of them leaves two passes, which tell what moved."""
    decoder = decoder_of(dict(recursion=recursion, inner_steps=12, norm='post'))
    vision, question, _ = sample(B=6)
    question[1, 4:], question[2, 1:] = PAD, PAD
    decoder.config.eos_id = -1  # no answer ends early
    whole = decoder.generate(vision, question, 5)
    assert torch.equal(decoder.generate(vision, question, 5, cache=Halting(1e-12)), whole)
    once, shallow = Halting(1e9), decoder_of(dict(recursion=recursion, inner_steps=2, norm='post'))
    shallow.config.eos_id = -1
    assert torch.equal(decoder.generate(vision, question, 5, cache=once), shallow.generate(vision, question, 5))
    assert torch.stack(once.taken).eq(2).all()
    depths = set()
    for halt in (.2, .4, .6, .8, 1.):
        cache = Halting(halt)
        written, taken = decoder.generate(vision, question, 5, cache=cache), torch.stack(cache.taken, dim=1)
        for b, n in enumerate((Q, 4, 1, Q, Q, Q)):
            row = halting_by_hand(decoder, vision[b:b + 1], question[b:b + 1, :n], 5, halt)
            assert (written[b].tolist(), taken[b].tolist()) == row
        depths |= set(taken.flatten().tolist())
    assert len(depths) > 4  # the thresholds were felt


@pytest.mark.parametrize('bad, message', [(dict(kind='trn'), 'kind=trn'), (dict(n_embd=30, n_head=4), 'n_embd=30'), (dict(n_head=4, n_kv_head=3), 'n_kv_head=3'),
                                          (dict(inner_steps=0), 'inner_steps=0'), (dict(recursion='sum'), 'recursion=sum: expected one of concat, add, loop'), (dict(norm='unbounded'), 'norm=unbounded')])
def test_bad_settings(bad, message):
    """A setting out of range is an error that names it."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(**bad)


def test_top_k():
    """top_k draws from so many of the likeliest tokens and no others."""
    decoder = decoder_of(CONCAT)
    vision, question, _ = sample()
    likeliest = decoder(vision, question, torch.full((3, 1), BOS))[0][:, 0].topk(3).indices
    firsts = torch.stack([decoder.generate(vision, question, 1, temperature=9., top_k=3, generator=torch.Generator().manual_seed(k))[:, 0] for k in range(60)])
    assert all(set(drawn.tolist()) == set(best.tolist()) for drawn, best in zip(firsts.T, likeliest))
    decoder.generate(vision, question, 1, temperature=1., top_k=10 ** 6)
