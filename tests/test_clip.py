"""encoder.py beside its peers: CLIP as transformers, open_clip, OpenAI and Edge-Glass store it gives the same tokens here."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, without_torchvision
from PIL import Image

import encoder as encoder_module
from encoder import Encoder, EncoderConfig, load_encoder, save_encoder
from plumbing.files import safe_load

with without_torchvision():
    open_clip, transformers = [pytest.importorskip(name) for name in ('open_clip', 'transformers')]
VISION = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64, max_position_embeddings=8,
            bos_token_id=1, eos_token_id=2)


def shaken(model, seed=0):
    """A model whose weights are all far from their start, so that a tensor in the wrong place shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1 if p.dim() == 1 and p.numel() > 1 else 0, .3)
    return model.eval()


def hugging_face(**settings):
    config = transformers.CLIPConfig(vision_config=VISION | settings, text_config=TEXT, projection_dim=16)
    return shaken(transformers.CLIPModel(config))


@pytest.fixture(scope='module')
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same_tokens(encoder, expected, images):
    tokens = encoder.encode_images(images)
    assert tokens.shape == expected.shape and (tokens - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('activation', ['quick_gelu', 'gelu'])
@pytest.mark.parametrize('form', ['safetensors', 'sharded safetensors', 'bin', 'sharded bin', 'weights file', 'vision only', 'transformers 4'])
def test_hugging_face(form, activation, tmp_path, images):
    """Every form of a Hugging Face folder gives the last hidden states of the patches, the class token dropped, as transformers does."""
    pytest.importorskip('safetensors')
    model = hugging_face(hidden_act=activation)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=images).last_hidden_state[:, 1:]
    if form == 'vision only':
        vision = transformers.CLIPVisionModel(model.config.vision_config)
        vision.load_state_dict({key.removeprefix('vision_model.'): t for key, t in model.state_dict().items() if key.startswith('vision_model.')})
        vision.save_pretrained(tmp_path)
    elif form.endswith('safetensors') or form == 'weights file':
        model.save_pretrained(tmp_path, max_shard_size='30KB' if form.startswith('sharded') else '1GB')
        assert len(list(tmp_path.glob('*.safetensors'))) > (2 if form.startswith('sharded') else 0)
    else:
        model.config.save_pretrained(tmp_path)
        weights = dict(model.state_dict())
        weights['vision_model.embeddings.position_ids'] = torch.arange(17)[None]  # files of transformers before 4.31 have it
        if form == 'transformers 4':  # only what differs from the defaults is written; the vision tower alone keeps its prefix
            config = json.loads((tmp_path / 'config.json').read_text())
            config['vision_config'] = {key: config['vision_config'][key] for key in (*VISION, *['hidden_act'] * (activation == 'gelu'))}
            (tmp_path / 'config.json').write_text(json.dumps(config))
            weights = {key: t for key, t in weights.items() if key.startswith('vision_model.')}
        keys = list(weights)
        parts = [keys[:40], keys[40:]] if form.startswith('sharded') else [keys]
        for i, part in enumerate(parts):
            name = f'pytorch_model-{i}.bin' if len(parts) > 1 else 'pytorch_model.bin'
            torch.save({key: weights[key] for key in part}, tmp_path / name)
        if len(parts) > 1:
            (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps(dict(
                weight_map={key: f'pytorch_model-{i}.bin' for i, part in enumerate(parts) for key in part})))
    e = load_encoder(tmp_path / 'model.safetensors' if form == 'weights file' else tmp_path)
    assert e.config.activation == activation and e.config.n_head == 4 and e.config.mlp_width == 96 and e.config.fit == 'crop'
    same_tokens(e, expected, images)


def open_clip_model(quick_gelu):
    return shaken(open_clip.model.CLIP(
        16, dict(layers=2, width=128, head_width=64, patch_size=8, image_size=32), dict(context_length=8, vocab_size=64, width=16, heads=2, layers=1),
        quick_gelu=quick_gelu))


def patch_states(model, images):
    """open_clip's last hidden states of the patches."""
    with torch.no_grad():
        x = model.visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([model.visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + model.visual.positional_embedding
        return model.visual.transformer(model.visual.ln_pre(x))[:, 1:]


@pytest.mark.parametrize('quick_gelu', [False, True])
@pytest.mark.parametrize('form', ['folder', 'safetensors', 'training checkpoint'])
def test_open_clip(form, quick_gelu, tmp_path, images):
    """open_clip's files give its own hidden states; where the file does not tell the activation, it can be set."""
    model = open_clip_model(quick_gelu)
    path, changes = tmp_path, dict(activation='quick_gelu' if quick_gelu else 'gelu')
    if form == 'folder':
        torch.save(model.state_dict(), tmp_path / 'open_clip_pytorch_model.bin')
        (tmp_path / 'open_clip_config.json').write_text(json.dumps(dict(
            model_cfg=dict(embed_dim=16, quick_gelu=quick_gelu, vision_cfg=dict(width=128, head_width=64)), preprocess_cfg=dict(mean=[.5, .4, .3]))))
        changes = {}
    elif form == 'safetensors':
        path = tmp_path / 'weights.safetensors'
        pytest.importorskip('safetensors.torch').save_file({key: t.contiguous() for key, t in model.state_dict().items()}, path)
    else:
        path = tmp_path / 'epoch_3.pt'
        torch.save(dict(epoch=3, state_dict={f'module.{key}': t for key, t in model.state_dict().items()}), path)
    e = load_encoder(path, **changes)
    assert e.config.n_head == 2 and (form != 'folder' or e.config.mean == (.5, .4, .3))
    same_tokens(e, patch_states(model, images), images)


class Wrapped(torch.nn.Module):
    """A module as OpenAI's archive has it: scalars beside the parameters, everything in half precision."""

    def __init__(self, state):
        super().__init__()
        for key, value in dict(input_resolution=32, context_length=8, vocab_size=64).items():
            self.register_buffer(key, torch.tensor(value))
        for key, t in state.items():
            module = self
            *path, last = key.split('.')
            for part in path:
                module = module._modules.setdefault(part, torch.nn.Module())
            module.register_parameter(last, torch.nn.Parameter(t.clone()))

    def forward(self, x):
        return x


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_openai(tmp_path, images):
    """OpenAI's TorchScript archive in half precision gives the tokens of its weights, with quick-GELU, and its code is not run."""
    model = open_clip_model(quick_gelu=True)
    model.half().float()
    path = tmp_path / 'ViT.pt'
    torch.jit.save(torch.jit.script(Wrapped(model.half().state_dict())), path)
    e = load_encoder(path)
    assert e.config.activation == 'quick_gelu' and e.config.n_head == 2
    same_tokens(e, patch_states(model.float(), images), images)


# ----------------------------------------------------------------------------
# Edge-Glass' aligned checkpoints

@dataclasses.dataclass
class ExperimentConfig:
    name: str = 'perceiver'


class SeedReader(torch.nn.Module):
    def __init__(self, D):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(D), torch.nn.LayerNorm(D)
        self.attn = torch.nn.ModuleDict(dict(to_q=torch.nn.Linear(D, D, bias=False), to_kv=torch.nn.Linear(D, 2 * D, bias=False),
                                             to_out=torch.nn.Linear(D, D)))
        self.ff = torch.nn.Module()
        self.ff.net = torch.nn.Sequential(torch.nn.Linear(D, 4 * D), torch.nn.GELU(), torch.nn.Dropout(.1), torch.nn.Linear(4 * D, D))

    def forward(self, latents, x):
        q = self.attn['to_q'](self.norm1(latents))
        k, v = self.attn['to_kv'](self.norm1(x)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        latents = latents + self.attn['to_out'](y)
        return latents + self.ff.net(self.norm2(latents))


class SeedEncoder(torch.nn.Module):
    """The picture tower of Edge-Glass, from its description (three versions), to compare with."""

    def __init__(self, version, perceiver, D=40, out=24):
        super().__init__()
        self.encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION | dict(num_attention_heads=1)))
        W, linear, self.version = VISION['hidden_size'], torch.nn.Linear, version
        if perceiver:
            self.perceiver = torch.nn.Module()
            self.perceiver.latents = torch.nn.Parameter(torch.randn(5, D))
            self.perceiver.layers = torch.nn.ModuleList(SeedReader(D) for _ in range(2))
            self.perceiver.norm = torch.nn.LayerNorm(D)
            self.projector, self.final_projector = linear(W, D), linear(D, out)
            if version == '8f75c10':
                self.projector = torch.nn.Module()
                self.projector.net = torch.nn.Sequential(torch.nn.LayerNorm(W), linear(W, 56), torch.nn.GELU(), torch.nn.Dropout(.1), linear(56, D))
                self.projector.forward = self.projector.net.forward
                self.final_projector = torch.nn.Sequential(torch.nn.LayerNorm(D), linear(D, out))
        else:
            self.projector = linear(W, out)
            if version != '09db6be':
                self.attention_pool = torch.nn.ModuleDict(dict(attn_proj=linear(out, 1), layer_norm=torch.nn.LayerNorm(out)))
                self.attention_pool.query = torch.nn.Parameter(torch.randn(1, out))

    @torch.no_grad()
    def forward(self, images):
        x = self.encoder(images).last_hidden_state
        if not hasattr(self, 'perceiver'):
            return self.projector(x if hasattr(self, 'attention_pool') else x[:, 1:])
        x, latents = self.projector(x[:, 1:]), self.perceiver.latents.expand(len(x), -1, -1)
        for layer in self.perceiver.layers:
            latents = layer(latents, x)
        return self.final_projector(self.perceiver.norm(latents))


@pytest.mark.parametrize('perceiver', [True, False])
@pytest.mark.parametrize('version', ['09db6be', 'a25b75c', '8f75c10'])
def test_edge_glass(version, perceiver, tmp_path, images, monkeypatch):
    """The aligned checkpoints of Edge-Glass' three versions give its token sequence; its pickled settings are not run, its other towers
    are not read."""
    seed = shaken(SeedEncoder(version, perceiver))
    monkeypatch.setitem(sys.modules, 'config', types.SimpleNamespace(ExperimentConfig=ExperimentConfig))
    monkeypatch.setattr(ExperimentConfig, '__module__', 'config')
    weights = {f'vision_encoder.{key}': t for key, t in seed.state_dict().items()}
    if version == '09db6be':  # transformers 4 had one more level in the names
        weights = {key.replace('vision_encoder.encoder.', 'vision_encoder.encoder.vision_model.'): t for key, t in weights.items()}
    weights |= {'text_encoder.weight': torch.ones(3), 'decoder.base_model.model.x': torch.ones(3), 'llm_projector.weight': torch.ones(3)}
    torch.save(dict(epoch=1, best_val_loss=.5, model_state_dict=weights, history=[1.], config=ExperimentConfig()), tmp_path / 'checkpoint_best.pt')
    monkeypatch.delitem(sys.modules, 'config')
    e = load_encoder(tmp_path / 'checkpoint_best.pt')
    assert e.config.fit == 'squash' and e.config.prefixes == (24,)
    same_tokens(e, seed(images), images)


def test_training_checkpoint(tmp_path, images):
    """What open_clip's training writes, module. before every name and optimizer, arguments, paths and NumPy's numbers beside the weights, gives the tokens of its weights;
    what stands beside them is not built."""
    import argparse
    import pathlib
    model = shaken(open_clip_model(quick_gelu=False))
    weights = {f'module.{key}': t for key, t in model.state_dict().items()}
    beside = argparse.Namespace(lr=np.float64(.1), logs=pathlib.PosixPath('x'), copies=[np.arange(3), np.dtype('f4'), np.bool_(True), pathlib.PureWindowsPath('x')])
    checkpoint = dict(epoch=np.int64(1), name='x', state_dict=weights, optimizer=torch.optim.AdamW(model.parameters()).state_dict(), args=beside)
    torch.save(checkpoint, tmp_path / 'epoch_1.pt')
    same_tokens(load_encoder(tmp_path / 'epoch_1.pt'), patch_states(model, images), images)
    assert type(safe_load(tmp_path / 'epoch_1.pt')['args']).__name__ == 'Inert'
    beside.copies = Evil()
    torch.save(checkpoint, tmp_path / 'evil.pt')
    with pytest.raises(ValueError, match='evil.pt: not a file that can be read safely'):
        load_encoder(tmp_path / 'evil.pt')


def test_mean_and_std(tmp_path, capsys):
    """Mean and std of the pixels come from preprocessor_config.json, or from the processor_config.json that transformers 5 writes in its place; where there is neither, what
    is assumed is said once."""
    hugging_face().save_pretrained(tmp_path)
    assert load_encoder(tmp_path).config.mean == encoder_module.CLIP_MEAN
    assert capsys.readouterr().out.count('assumed are mean (0.48') == 1
    values = dict(image_mean=[.1, .2, .3], image_std=[.4, .5, .6])
    for name, content in (('processor_config.json', dict(image_processor=values)), ('preprocessor_config.json', values)):
        (tmp_path / name).write_text(json.dumps(content))
        config = load_encoder(tmp_path).config
        assert config.mean == (.1, .2, .3) and config.std == (.4, .5, .6) and 'assumed' not in capsys.readouterr().out
        (tmp_path / name).unlink()
    (tmp_path / name).write_text(json.dumps(values | dict(do_normalize=False)))
    config = load_encoder(tmp_path).config
    assert config.mean == (0, 0, 0) and config.std == (1, 1, 1)


def test_from_clip_to_answers(tmp_path, tiny_shapes):
    """The whole way on the command line: CLIP as Hugging Face stores it, aligned by config/align_pixmo.py, read by config/trm_pixmo.py at a Matryoshka
    prefix, evaluated; with the cache and without it the result is nearly the same."""
    hugging_face().save_pretrained(tmp_path / 'clip')

    def run(*argv):
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    common = [f'--dataset={tiny_shapes}', f'--cache_dir={tmp_path}/cache', '--max_steps=20', '--eval_interval=10', '--log_interval=10', '--device=cpu']
    text = run('-m', 'align', 'config/align_pixmo.py', *common, f'--out_dir={tmp_path}/align', f'--trunk={tmp_path}/clip', '--batch_size=16', '--encoder_px=48',
               '--pool=2', '--n_latents=4', '--perceiver_layers=1', '--perceiver_width=32', '--perceiver_heads=2', '--encoder_dim=32', '--prefixes=8,32',
               '--text_width=32', '--text_layers=1', '--vocab_size=300')
    assert 'interpolated from 4 x 4 to 6 x 6' in text and 'retrieval among 20 pictures' in text and 'frozen trunk' in text
    e = load_encoder(tmp_path / 'align/encoder.pt')
    assert e.config.prefixes == (8, 32) and e.config.pool == 2 and e.encode_images(torch.randn(1, 3, 48, 48)).shape == (1, 4, 32)
    clip = load_encoder(tmp_path / 'clip', image_px=48)
    assert all(torch.equal(t.half(), clip.state_dict()[key].half()) for key, t in e.state_dict().items() if key.startswith('trunk.'))
    (tmp_path / 'test_alone').mkdir()
    shutil.copy(tiny_shapes / 'test.parquet', tmp_path / 'test_alone')
    for flag in ('--split=val', f'--dataset={tmp_path}/test_alone'):
        assert 'median rank' in run('-m', 'align.judge', f'--out_dir={tmp_path}/align', flag)

    ems = []
    for name, flags in (('cached', []), ('fresh', ['--cache=false'])):
        run('train.py', 'config/trm_pixmo.py', *common, *flags, f'--out_dir={tmp_path}/{name}', f'--encoder={tmp_path}/align/encoder.pt', '--tokenizer=bpe',
            '--vision_dim=8', '--n_embd=16', '--n_head=2', '--n_kv_head=1', '--batch_size=16')
        ems.append(json.loads((tmp_path / name / 'metrics.json').read_text()))
    assert abs(ems[0]['loss'] - ems[1]['loss']) < .01 and ems[0]['peak_memory_gb'] > .1
    again = run('eval.py', f'--out_dir={tmp_path}/cached')
    assert 'mean of types' in again
    run('-m', 'lab.passes', f'--out_dir={tmp_path}/cached')


# ----------------------------------------------------------------------------
# nothing is run, nothing is lost

class Evil:
    def __reduce__(self):
        return os.system, ('touch HACKED',)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_no_loader_runs_code(tmp_path, monkeypatch):
    """Code hidden in a .bin, in a checkpoint of Edge-Glass' form and in a TorchScript archive is refused and not run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'hf').mkdir()
    torch.save({'vision_model.embeddings.class_embedding': Evil()}, 'hf/pytorch_model.bin')
    torch.save(dict(model_state_dict={}, config=Evil()), 'checkpoint_best.pt')
    torch.save({'a': Evil()}, 'old.bin', _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(Wrapped({'visual.conv1.weight': torch.ones(1)})), 'good.pt')
    import pickle
    import zipfile
    with zipfile.ZipFile('good.pt') as good, zipfile.ZipFile('script.pt', 'w') as bad:
        for name in good.namelist():
            bad.writestr(name, pickle.dumps(Evil()) if name.endswith('/data.pkl') else good.read(name))
    for name in ('hf', 'checkpoint_best.pt', 'old.bin', 'script.pt'):
        with pytest.raises(ValueError, match='can be read safely'):
            load_encoder(name)
    assert not os.path.exists('HACKED')


def test_every_tensor_counts(tmp_path):
    """A missing tensor, one too many and a folder or file of something else are errors that name them."""
    model = hugging_face()
    for change, message in ((lambda w: w.pop('vision_model.encoder.layers.1.mlp.fc1.bias'), 'trunk.blocks.1.fc1.bias'),
                            (lambda w: w.update({'vision_model.encoder.layers.0.scale': torch.ones(1)}), 'trunk.blocks.0.scale'),
                            (lambda w: w.update({'audio_model.weight': torch.ones(1)}), 'audio_model.weight'),
                            (lambda w: w.pop('vision_model.encoder.layers.2.self_attn.k_proj.weight'), 'blocks.2.qkv.weight'),
                            (lambda w: [w.pop(key) for key in list(w) if 'vision' in key], 'text_model')):
        weights = dict(model.state_dict())
        change(weights)
        torch.save(weights, tmp_path / 'w.bin')
        with pytest.raises(ValueError, match=message):
            load_encoder(tmp_path / 'w.bin', n_head=4)
    model.save_pretrained(tmp_path / 'short')
    weights = {key: t for key, t in model.state_dict().items() if 'layers.2.' not in key}
    (tmp_path / 'short/model.safetensors').unlink()
    torch.save(weights, tmp_path / 'short/pytorch_model.bin')
    with pytest.raises(ValueError, match='weights are missing: trunk.blocks.2'):  # the config says that there are three layers
        load_encoder(tmp_path / 'short')
    (tmp_path / 'short/config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json: not JSON'):
        load_encoder(tmp_path / 'short')
    for name, content, reason in (('aborted.pt', b'', ''), ('odd.pt', b'\x80\x02.', ''), ('answer.pt', b'{"error": "no access"}\n', "it is text: '{.error")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f'can be read safely .{reason}') as error:
            load_encoder(tmp_path / name)
        assert 'weights_only' not in str(error.value)  # torch's advice would run what is in the file
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='a folder without weights'):
        load_encoder(tmp_path / 'empty')
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps(dict(weight_map={'a': '../../etc/passwd'})))
    with pytest.raises(FileNotFoundError, match='passwd: no such file'):  # looked for in the folder itself
        load_encoder(tmp_path)


def test_other_picture_sizes(tmp_path, images, capsys):
    """Positions are interpolated to another square, as transformers does it but for the size of the steps, and this is said aloud; at its own
    size nothing changes."""
    model = hugging_face()
    model.save_pretrained(tmp_path)
    e = load_encoder(tmp_path, image_px=48)
    assert 'interpolated from 4 x 4 to 6 x 6' in capsys.readouterr().out
    big = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=big, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    same_tokens(e, expected, big)
    assert 'interpolated' not in capsys.readouterr().out and load_encoder(tmp_path, image_px=32).config.image_px == 32
    with pytest.raises(ValueError, match='image_px=50'):
        load_encoder(tmp_path, image_px=50)


def test_own_file_of_a_clip(tmp_path, images):
    """An encoder that began as CLIP is written to and read from this project's own file, in half precision."""
    hugging_face().save_pretrained(tmp_path)
    e = load_encoder(tmp_path)
    save_encoder(e, tmp_path / 'own.pt')
    back = load_encoder(tmp_path / 'own.pt')
    assert back.config == e.config and torch.allclose(back(images), e(images), rtol=.02, atol=.05)


# ----------------------------------------------------------------------------
# pictures

def noise(mode, size, seed=0):
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), np.uint8), 'RGBA')
    if mode == 'P':
        picture = picture.quantize(17)
        if seed % 2:
            picture.info['transparency'] = 3
        return picture
    return picture if mode == 'RGBA' else picture.convert('LA') if mode == 'LA' else picture.convert('RGB').convert(mode)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'LA', 'RGBA', 'P', 'CMYK', '1'])
def test_preprocessing(mode):
    """Pictures of every mode and of odd sizes come out bit by bit as from transformers' CLIP processor on Pillow."""
    Processor = getattr(transformers, 'CLIPImageProcessorPil', None) or transformers.CLIPImageProcessor
    theirs = Processor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    e = Encoder(EncoderConfig(image_px=32, stem='patch', fit='crop', mean=encoder_module.CLIP_MEAN, std=encoder_module.CLIP_STD))
    for k, size in enumerate([(32, 32), (100, 40), (40, 100), (33, 31), (7, 90), (211, 32), (64, 65), (31, 33), (500, 333)]):
        picture = noise(mode, size, k)
        expected = torch.as_tensor(np.asarray(theirs(picture, return_tensors='np')['pixel_values'][0]))
        assert torch.equal(e.preprocess(picture), expected), size


def test_fit():
    """crop keeps the middle, squash the whole picture out of shape, pad the whole picture in shape between gray bars."""
    picture = Image.new('RGB', (96, 32), (255, 0, 0))
    picture.paste((0, 0, 255), (32, 0, 64, 32))  # red, blue, red
    red = {}
    for fit in ('crop', 'squash', 'pad'):
        pixels = Encoder(EncoderConfig(image_px=48, fit=fit)).pixels(picture)
        assert pixels.shape == (3, 48, 48)
        red[fit] = ((pixels[0] > 240) & (pixels[2] < 15)).float().mean().item()
        assert fit != 'pad' or (pixels[:, 0] == 128).all() and (pixels[:, -1] == 128).all()
    assert red['crop'] == 0 and .6 < red['squash'] < .7 and .18 < red['pad'] < .24


def test_upright():
    """A photograph stored lying down is turned as its EXIF orientation says, unless upright=False."""
    picture, file = Image.new('RGB', (64, 64), 'white'), io.BytesIO()
    picture.paste('black', (0, 0, 64, 32))  # the upper half
    exif = picture.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    picture.save(file, 'PNG', exif=exif)
    pixels = [Encoder(EncoderConfig(upright=upright)).pixels(Image.open(file)) for upright in (True, False)]
    assert (pixels[0][:, :, 33:] == 0).all() and (pixels[0][:, :, :31] == 255).all() and (pixels[1][:, :31] == 0).all()
