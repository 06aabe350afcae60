"""A device that is kept busy: batches a step ahead, files fetched before they are encoded, tokens that stay on the device."""

import threading
from types import SimpleNamespace

import pytest
import torch

from data import read_rows
from encoder import load_encoder
from plumbing.features import ContextTokens, FileTokens
from plumbing.machine import mapped, on_device
from plumbing.steps import Ahead


def test_ahead():
    """Every step has its own batch, made once and in a thread, the next one before it is asked for, and none after the last."""
    begun = []
    second = threading.Event()

    def make(step):
        begun.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            second.set()
        if step == 3:
            raise ValueError('a bad file')
        return 10 * step

    ahead = Ahead(make, max_steps=5)
    assert ahead(0) == 0 and second.wait(10)       # begun though nobody asked for it
    assert ahead(1) == 10 and ahead(2) == 20
    with pytest.raises(ValueError, match='a bad file'):
        ahead(3)
    assert ahead(4) == 40
    ahead.thread.shutdown()
    assert begun == [(k, False) for k in range(5)]
    assert Ahead(make, max_steps=9)(7) == 70            # a run that goes on begins there


@pytest.mark.parametrize('form, dtype', [('on disk', torch.float16), ('resident', torch.int64), ('anew', torch.uint8), ('trained', torch.uint8)])
def test_fetch_and_encode(form, dtype, tiny_shapes, tiny_encoder, tmp_path, monkeypatch):
    """What is fetched ahead and encoded on the device is what a call gives, in every form; it is as small as can be. Where rows have no picture it is None."""
    rows, encoder = read_rows(tiny_shapes, 'val'), load_encoder(tiny_encoder)
    nbytes = 20 * 4 * 16 * 2  # of all tokens
    monkeypatch.setattr('plumbing.features.room_on', lambda device: 8 * nbytes if form == 'resident' else 8 * nbytes - 1)
    settings = dict(vision_dim=None, cache_dir=tmp_path, cache=form != 'anew', train_encoder=form == 'trained')
    encoder.requires_grad_(form == 'trained')
    tokens_of = ContextTokens(settings, dict(encoder=encoder), rows, 'cpu')
    batch = dict(picture=torch.tensor([3, 0, 3, 19]), sound=torch.full((4,), -1), question=torch.zeros(4, 2))
    fetched = tokens_of.fetch(batch)
    assert fetched['picture'].dtype == dtype and fetched['sound'] is None and fetched['question'] is batch['question']
    vision, sound = tokens_of.encode(fetched)
    assert sound is None and vision.shape == (4, 4, 16) and vision.requires_grad == (form == 'trained')
    assert torch.equal(vision, tokens_of(batch)[0]) and torch.equal(vision[0], vision[2]) and not torch.equal(vision[0], vision[1])
    direct = FileTokens(encoder, rows.pictures, 'cpu', tmp_path, cache=False)(encoder, batch['picture'])
    torch.testing.assert_close(vision, direct, atol=.02, rtol=.02)  # halves, of products in bfloat16
    without = tokens_of.fetch(batch | dict(picture=torch.full((4,), -1)))
    assert without['picture'] is None and tokens_of.encode(without) == [None, None]
    blind = ContextTokens(settings, {}, rows, 'cpu')
    assert blind.encode(blind.fetch(batch)) == [None, None]


def test_nested():
    """Tensors of nested lists and dicts are moved, everything else stays."""
    given = dict(batches=[dict(words=torch.zeros(2), sound=None)], names=('a', 'b'), weight=1)
    moved = on_device(given, 'meta')
    assert moved['batches'][0]['words'].is_meta and moved['batches'][0]['sound'] is None
    assert moved['names'] == ['a', 'b'] and moved['weight'] == 1
    seen = SimpleNamespace(n=0)
    mapped(lambda t: setattr(seen, 'n', seen.n + 1), given)
    assert seen.n == 1
