import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if 'PYTEST_XDIST_WORKER' in os.environ:  # tests run side by side: a thread each, before torch counts the cores
    os.environ.setdefault('OMP_NUM_THREADS', '1')


@contextmanager
def without_torchvision():
    """Peers that import torchvision can be imported here: its compiled operators do not load beside a CPU build of torch, and none of them is needed."""
    import torch
    real = torch.library.register_fake
    torch.library.register_fake = lambda name, *args, **kwargs: (lambda f: f) if str(name).startswith('torchvision::') else real(name, *args, **kwargs)
    try:
        yield
    finally:
        torch.library.register_fake = real


@pytest.fixture(scope='session')
def tiny_shapes(tmp_path_factory):
    """A folder with a small shapes dataset."""
    from prepare.shapes import Config as ShapesConfig
    from prepare.shapes import draw_shapes
    out = tmp_path_factory.mktemp('data') / 'shapes'
    draw_shapes(ShapesConfig(out=str(out), n_train=60, n_val=20, n_test=20))
    return out


@pytest.fixture(scope='session')
def tiny_encoder(tmp_path_factory):
    """The file of a small encoder with random weights."""
    import torch

    from encoder import Encoder, EncoderConfig, save_encoder
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('encoder') / 'encoder.pt'
    save_encoder(Encoder(EncoderConfig(width=32, n_layer=1, n_latents=4, vision_dim=16, prefixes=(4, 8, 16))), path)
    return path
