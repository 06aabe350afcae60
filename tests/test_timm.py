"""Networks of timm as trunks, names of the hub: tokens and preprocessing are the library's own; nothing is fetched that need not be, and nothing runs."""

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, without_torchvision
from PIL import Image
from test_clip import hugging_face

import align.__main__ as align
import train
from align import judge
from encoder import load_encoder
from prepare.shapes import Config as ShapesConfig
from prepare.shapes import draw_shapes
from pretrained import hub

with without_torchvision():
    timm = pytest.importorskip('timm')
save_file = pytest.importorskip('safetensors.torch').save_file
# timm's own small networks of each family: a ViT; one that pools by attention, as SigLIP, with a register; CNNs; one whose map has its channels last
NETWORKS = {'test_vit': 160, 'test_vit3': 160, 'vit_small_patch14_reg4_dinov2': 56, 'test_efficientnet': 160, 'test_resnet': 150, 'swin_s3_tiny_224': 128}


def network(name, px, path, **more):
    """A network with weights far from their start, and a file of them; timm's own preprocessing for it."""
    sized = dict(img_size=px) if timm.get_pretrained_cfg(name).fixed_input_size else {}
    torch.manual_seed(0)
    net = timm.create_model(name, **sized, **more).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(.02 * torch.randn_like(p))
        for key, b in net.named_buffers():
            if 'running_mean' in key:
                b.normal_(0, .1)
    torch.save(net.state_dict(), path)
    config = timm.data.resolve_data_config(dict(img_size=px), model=net)
    return net, timm.data.create_transform(**config)


@pytest.fixture(scope='module')
def few_shapes(tmp_path_factory):
    """Questions with short answers: an untrained decoder never stops."""
    out = tmp_path_factory.mktemp('few') / 'shapes'
    draw_shapes(ShapesConfig(out=str(out), n_train=30, n_val=12, n_test=12, describe=0, types='shape,exist'))
    return out


def pictures(folder):
    """Files of odd sizes and modes."""
    rng = np.random.default_rng(0)
    for k, (size, mode) in enumerate([((301, 200), 'RGB'), ((97, 333), 'RGB'), ((64, 64), 'L'), ((150, 151), 'P'), ((223, 40), 'RGB')]):
        small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize(size)
        small.convert(mode).save(folder / f'{k}.png')
        yield folder / f'{k}.png'


@pytest.mark.parametrize('name', NETWORKS)
def test_tokens_are_timms_own(name, tmp_path):
    """From the picture file on: the same pixels, the same tokens; class token and registers are left out; side and width are what timm says."""
    px = NETWORKS[name]
    net, transform = network(name, px, tmp_path / 'w.pth')
    e = load_encoder(f'timm/{name}@{tmp_path}/w.pth', image_px=px)
    for file in pictures(tmp_path):
        ours, its = e.preprocess(Image.open(file)), transform(Image.open(file).convert('RGB'))
        assert torch.equal(ours, its), file
        with torch.no_grad():
            x = net.forward_features(its[None])
        if x.dim() == 4:
            x = x.flatten(1, 2) if name.startswith('swin') else x.flatten(2).mT
        else:
            x = x[:, net.num_prefix_tokens:]
        tokens = e.encode_images(ours[None])
        assert tokens.shape == x.shape == (1, e.config.side ** 2, e.config.vision_dim)
        torch.testing.assert_close(tokens, x, atol=1e-5 * x.abs().max().item(), rtol=0)
    assert x.std() > .01
    prefix = dict(test_vit=1, test_vit3=1, vit_small_patch14_reg4_dinov2=5).get(name, 0)
    assert getattr(net, 'num_prefix_tokens', 0) == prefix


@pytest.mark.parametrize('mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct', [1.0, .9, .875])
def test_every_way_to_make_it_square(mode, crop_pct, tmp_path):
    """Whatever a network's pictures should be like: equal to timm's transforms bit by bit, with each filter."""
    from plumbing.pictures import squared
    for interpolation in ('bicubic', 'bilinear', 'lanczos'):
        config = dict(input_size=(3, 61, 61), crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation, mean=(.4, .5, .6), std=(.2, .2, .2))
        transform = timm.data.create_transform(**config, normalize=False)
        fit = dict(center='crop', squash='squash', border='pad')[mode]
        for file in pictures(tmp_path):
            picture = Image.open(file).convert('RGB')
            ours = squared(picture, 61, fit, (102, 128, 153), crop_pct, interpolation, half_to_even=True)
            assert np.array_equal(np.array(ours), transform(picture).permute(1, 2, 0).numpy()), (file, interpolation)


def test_the_rest_of_a_picture_is_seen_when_it_is_fitted_otherwise(tmp_path):
    network('test_resnet', 160, tmp_path / 'w.pth')
    name = f'timm/test_resnet@{tmp_path}/w.pth'
    assert load_encoder(name).config.crop_pct == .95 == load_encoder(name, fit='crop').config.crop_pct
    assert load_encoder(name, fit='squash').config.crop_pct == load_encoder(name, fit='pad').config.crop_pct == 1
    assert len({load_encoder(name, fit=fit).fingerprint() for fit in (None, 'squash', 'pad')}) == 3


def test_other_classes_and_sides(tmp_path):
    """A head of other classes is left alone; a transformer's positions fit another side; a side that does not fit is an error."""
    network('test_vit', 160, tmp_path / 'w.pth', num_classes=7)
    name = f'timm/test_vit@{tmp_path}/w.pth'
    assert load_encoder(name).encode_images(torch.zeros(1, 3, 160, 160)).shape == (1, 100, 64)
    assert load_encoder(name, image_px=96).encode_images(torch.zeros(1, 3, 96, 96)).shape == (1, 36, 64)
    network('test_resnet', 160, tmp_path / 'r.pth')
    e = load_encoder(f'timm/test_resnet@{tmp_path}/r.pth', image_px=150)
    assert e.config.side == 5 and e.encode_images(torch.zeros(1, 3, 150, 150)).shape == (1, 25, e.config.width)


def test_messages(tmp_path, monkeypatch):
    """Each says what was expected: names near a wrong one, a file that is not there, weights of another network, timm that is missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'timm/test_vit').mkdir(parents=True)  # whatever lies there, timm/ means timm
    network('test_resnet', 160, 'w.pth')
    with pytest.raises(ValueError, match='no such network; near it: .*efficientnet_lite0'):
        load_encoder('timm/efficientnet_lite00')
    with pytest.raises(ValueError, match='knows no such weights; it knows test_vit.r160_in1k'):
        load_encoder('timm/test_vit.other@w.pth')
    with pytest.raises(FileNotFoundError, match='no such file of weights'):
        load_encoder('timm/test_vit@none.pth')
    with pytest.raises(ValueError, match='(?s)timm cannot build it.*Missing key.*cls_token'):
        load_encoder('timm/test_vit@w.pth')
    with pytest.raises(ValueError, match='takes no pictures of 100 pixels.*divisible'):
        network('test_vit', 160, 'v.pth')
        load_encoder('timm/test_vit@v.pth', image_px=100)
    torch.save(timm.create_model('pit_ti_224').state_dict(), 'p.pth')
    with pytest.raises(ValueError, match='features are 1 tokens a picture: expected a square of patches'):
        load_encoder('timm/pit_ti_224@p.pth')
    torch.save({'model': {f'module.{key}': t for key, t in torch.load('v.pth').items()}}, 'm.pth')
    assert load_encoder('timm/test_vit@m.pth').fingerprint() == load_encoder('timm/test_vit@v.pth').fingerprint()
    with pytest.raises(ValueError, match='timm knows no weights of this name on the hub; --encoder'):
        load_encoder('timm/test_vit4')
    Path('evil.pth').write_bytes(b'cos\nsystem\n(S\'touch ran\'\ntR.')
    with pytest.raises(ValueError):
        load_encoder('timm/test_vit@evil.pth')
    assert not Path('ran').exists()
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match='pip install timm'):
        load_encoder('timm/test_vit@w.pth')


def test_trained_along_its_statistics_stay(tmp_path):
    """A training step moves the weights of a network and not what its batch norms measured; each picture's tokens depend on it alone, also then."""
    network('test_efficientnet', 160, tmp_path / 'w.pth')
    e = load_encoder(f'timm/test_efficientnet@{tmp_path}/w.pth').train().requires_grad_(True)
    before = {key: t.clone() for key, t in e.state_dict().items()}
    images = torch.randn(3, 3, 160, 160)
    torch.testing.assert_close(e(images)[:1], e(images[:1]), atol=1e-4, rtol=1e-4)
    e(images).square().mean().backward()
    torch.optim.SGD(e.parameters(), lr=1.0).step()
    moved = {key for key, t in e.state_dict().items() if not torch.equal(t, before[key])}
    assert any('conv' in key for key in moved) and not any('running' in key for key in moved)


def test_aligned_then_trained(few_shapes, tmp_path, capsys):
    """Stage 1 on a network of timm, stage 2 on what came out; its file says which network it is and needs no other."""
    network('test_vit', 160, tmp_path / 'w.pth')

    common = [f'--dataset={few_shapes}', f'--cache_dir={tmp_path}/cache', '--max_steps=2', '--eval_interval=2', '--device=cpu', '--vocab_size=300']
    align.main([str(ROOT / 'config/align_pixmo.py'), *common, f'--out_dir={tmp_path}/align', f'--trunk=timm/test_vit@{tmp_path}/w.pth', '--batch_size=16',
        '--encoder_px=64', '--n_latents=4', '--perceiver_layers=1', '--perceiver_width=32', '--perceiver_heads=2', '--encoder_dim=32', '--prefixes=8,32',
        '--text_width=32', '--text_layers=1'])
    e = load_encoder(tmp_path / 'align/encoder.pt')
    assert e.config.trunk == 'timm/test_vit' and e.encode_images(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 32)
    judge.main([f'--out_dir={tmp_path}/align', '--split=val'])
    assert capsys.readouterr().out.count('retrieval among 12') == 2
    (tmp_path / 'w.pth').unlink()
    train.main([*common, f'--out_dir={tmp_path}/run', f'--encoder={tmp_path}/align/encoder.pt', '--max_answer_tokens=12'])
    assert 'exist' in capsys.readouterr().out


# ----------------------------------------------------------------------------
# the hub

SHA = 'a' * 40


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The hub's local cache with one CLIP in it, and no way to the hub."""
    constants = pytest.importorskip('huggingface_hub').constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    root = tmp_path / 'cache/models--someone--clip'
    (root / 'refs').mkdir(parents=True)
    (root / 'refs/main').write_text(SHA)
    hugging_face().save_pretrained(root / 'snapshots' / SHA)
    monkeypatch.chdir(tmp_path)
    return root


def test_a_name_of_the_hub(cached, tmp_path):
    """What lies in the cache is read without the hub, by its name or its revision; a local folder of that name comes first; its revision is known."""
    e = load_encoder('someone/clip')
    assert e.source == f'someone/clip@{SHA}' and e.config.width == 48
    assert load_encoder(f'someone/clip@{SHA}').fingerprint() == e.fingerprint()
    with pytest.raises(ValueError, match='none in the cache of the hub .*cache.*does not give it'):
        load_encoder('someone/clip@' + 'b' * 40)
    with pytest.raises(ValueError, match='someone/other: no file or folder'):
        load_encoder('someone/other')
    hugging_face(hidden_size=64).save_pretrained(tmp_path / 'someone/clip')
    local = load_encoder('someone/clip')
    assert local.config.width == 64 and local.source is None


def test_a_cache_without_weights_is_not_whole(cached):
    """A config that something else wanted is no network, nor are weights without a tokenizer a language model: the hub is asked, which is out of reach."""
    assert hub.folder_of('someone/clip', ['config.json', 'none.json'])
    with pytest.raises(ValueError, match='does not give it'):
        hub.folder_of('someone/clip', ['tokenizer.json', 'vocab.json'])
    (cached / 'snapshots' / SHA / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='does not give it'):
        load_encoder('someone/clip')


def test_what_is_fetched(monkeypatch, tmp_path, capsys):
    """One line says what and how large; JSON and safetensors alone, of the revision that was asked for; others only where there are no safetensors."""
    fetched = []
    hugging_face().save_pretrained(tmp_path / 'got')
    files = {'config.json': 10, 'model.safetensors': 2_000_000, 'pytorch_model.bin': 5, 'run.py': 5, 'onnx/model.onnx': 9, 'model.fp16.safetensors': 3, 'a/b.json': 1}

    def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError('not cached')
        fetched.append((repo_id, revision, allow_patterns))
        return str(tmp_path / 'got')

    def info(self, repo_id, revision, files_metadata):
        siblings = [types.SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
        return types.SimpleNamespace(sha='c' * 40, siblings=siblings)

    stand_in = types.ModuleType('huggingface_hub')
    stand_in.snapshot_download, stand_in.HfApi = download, type('HfApi', (), dict(model_info=info))
    constants = types.ModuleType('huggingface_hub.constants')
    stand_in.constants, constants.HF_HUB_CACHE = constants, 'cache'
    monkeypatch.setitem(sys.modules, 'huggingface_hub', stand_in)
    monkeypatch.setitem(sys.modules, 'huggingface_hub.constants', constants)
    assert load_encoder('someone/clip@main').source == 'someone/clip@' + 'c' * 40
    assert fetched == [('someone/clip', 'c' * 40, ['config.json', 'model.safetensors'])]
    assert 'fetching 2 files, 2.0 MB, revision cccc' in capsys.readouterr().out
    assert hub.files_to_fetch('x', {'pytorch_model.bin': 1, 'config.json': 1, 'evil.py': 1}) == ['config.json', 'pytorch_model.bin']
    assert hub.files_to_fetch('x', dict.fromkeys(['model-1-of-2.safetensors', 'model-2-of-2.safetensors', 'model.safetensors.index.json'])) == [
        'model-1-of-2.safetensors', 'model-2-of-2.safetensors', 'model.safetensors.index.json']
    both = ['model-1-of-2.safetensors', 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin']
    assert hub.files_to_fetch('x', dict.fromkeys(both)) == ['model.safetensors']
    assert hub.files_to_fetch('x', {'model.fp16.safetensors': 1, 'pytorch_model.bin': 1}) == ['pytorch_model.bin']
    with pytest.raises(ValueError, match='no weights that are read here.*it has evil.py'):
        hub.files_to_fetch('x', {'evil.py': 1})
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match='pip install huggingface_hub'):
        load_encoder('someone/clip')


def test_a_run_keeps_its_revision(cached, few_shapes, tmp_path, monkeypatch):
    """Where the hub has moved on, a run goes on and is evaluated with the revision that it began with; one that is gone is an error, as is another. With wrong_pictures every question is about another picture."""
    flags = [f'--dataset={few_shapes}', '--cache_dir=feat', '--out_dir=run', '--encoder=someone/clip', '--device=cpu', '--vocab_size=300', '--max_answer_tokens=12']
    train.main([*flags, '--max_steps=2'])
    moved = 'd' * 40
    hugging_face(hidden_size=64).save_pretrained(cached / 'snapshots' / moved)
    (cached / 'refs/main').write_text(moved)
    train.main([*flags, '--max_steps=4'])
    import eval as evaluation
    from plumbing.run import read_checkpoint
    checkpoint = read_checkpoint('run')
    assert checkpoint['encoder_source'] == f'someone/clip@{SHA}' and checkpoint['run']['step'] == 4
    evaluation.main(['--out_dir=run', '--split=val', '--device=cpu'])
    asked = []
    tokens_of = evaluation.ContextTokens
    monkeypatch.setattr(evaluation, 'ContextTokens', lambda *args: lambda batch: asked.append(batch['picture']) or tokens_of(*args)(batch))
    for flags_of in ([], ['--wrong_pictures=true']):
        evaluation.main(['--out_dir=run', '--split=val', '--device=cpu', *flags_of])
    n = len(asked) // 2  # every picture is another one then, and none is left out
    right, wrong = torch.cat(asked[:n]), torch.cat(asked[n:])
    assert (right != wrong).all() and set(right.tolist()) == set(wrong.tolist()) == set(range(12))
    with pytest.raises(ValueError, match='another fingerprint'):
        train.main([*flags, f'--encoder=someone/clip@{moved}', '--max_steps=6'])
    shutil.rmtree(cached / 'snapshots' / SHA)
    with pytest.raises(ValueError, match='does not give it'):
        evaluation.main(['--out_dir=run', '--split=val', '--device=cpu'])
