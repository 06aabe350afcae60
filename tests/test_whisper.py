"""Whisper's encoder: the tokens of transformers, from the sound file on, and what becomes of files that are not whole."""

import hashlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import without_torchvision
from test_clip import shaken
from test_sounds import tone, wav

from align import __main__ as align_main
from align import judge
from encoder import (
    Encoder,
    EncoderConfig,
    build_encoder,
    encoder_of_run,
    load_encoder,
    open_encoder,
    save_encoder,
)
from plumbing.features import PixelReader, cached_features, picture_from, pixel_array
from plumbing.tables import SOUND_SCHEMA, SPLITS, write_dataset

with without_torchvision():
    transformers = pytest.importorskip('transformers')
pytest.importorskip('safetensors')
SIZES = dict(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=80, max_source_positions=50,
             decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=64, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=1)


def whisper(**settings):
    """A whole small Whisper with random weights; its sounds are one second long unless told otherwise."""
    return shaken(transformers.WhisperModel(transformers.WhisperConfig(**SIZES | settings)))


def extractor(**settings):
    return transformers.WhisperFeatureExtractor(**dict(feature_size=80, chunk_length=1) | settings)


@torch.no_grad()
def states(model, spectra):
    return model.encoder(torch.as_tensor(spectra)).last_hidden_state


class Files(list):
    """Sounds as a split has them."""

    @property
    def digests(self):
        return [hashlib.sha256(data).digest() for data in self]

    names = [f'sound {k}' for k in range(9)]


def melody(k=0, seconds=.8):
    noise = np.random.default_rng(k).standard_normal(round(16000 * seconds))
    return .2 * tone(300 + 200 * k, seconds, 16000) + .05 * noise


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the encoder, the decoder and the feature extractor of a small Whisper."""
    path = tmp_path_factory.mktemp('whisper')
    whisper().save_pretrained(path)
    extractor().save_pretrained(path)
    return path


@pytest.mark.parametrize('form', ['whole', 'with its head', 'encoder alone', 'bare', 'sharded', 'bin', 'weights file', '128 bands'])
def test_hidden_states(form, tmp_path):
    """Every form of a folder gives the last hidden states of transformers' WhisperEncoder; of a whole Whisper the decoder is left alone."""
    model = whisper(num_mel_bins=128, encoder_layers=3) if form == '128 bands' else whisper()
    weights = {f'model.{key}': t for key, t in model.state_dict().items()}
    if form == 'with its head':
        whole = transformers.WhisperForConditionalGeneration(model.config)
        whole.model = model
        whole.save_pretrained(tmp_path)
        weights |= {'proj_out.weight': torch.zeros(64, 32)}  # older files have it beside
        torch.save(weights, tmp_path / 'pytorch_model.bin')
        (tmp_path / 'model.safetensors').unlink()
    elif form in ('bin', 'encoder alone', 'bare'):
        model.config.save_pretrained(tmp_path)
        cut = {'bin': '', 'encoder alone': 'model.', 'bare': 'model.encoder.'}[form]
        torch.save({key.removeprefix(cut): t for key, t in weights.items() if form == 'bin' or '.decoder.' not in key}, tmp_path / 'pytorch_model.bin')
    else:
        model.save_pretrained(tmp_path, max_shard_size='20KB' if form == 'sharded' else '1GB')
        assert len(list(tmp_path.glob('*.safetensors'))) > (2 if form == 'sharded' else 0)
    e = load_encoder(tmp_path / 'model.safetensors' if form == 'weights file' else tmp_path)
    c = e.config
    assert (c.reads, c.bands, c.n_latents, c.projection, c.vision_dim, c.prefixes) == ('sound', model.config.num_mel_bins, 0, 'none', 32, (32,))
    spectra = torch.randn(3, c.bands, 100, generator=torch.Generator().manual_seed(1))
    expected = states(model, spectra)
    tokens = e.encode_images(spectra)
    assert tokens.shape == (3, 50, 32) and expected.std() > .1 and (tokens - expected).abs().max() < 1e-4
    assert not any(p.requires_grad for p in e.parameters()) and not e.training


def test_positions():
    """A new trunk begins with Whisper's own sinusoids."""
    with torch.no_grad():
        theirs = transformers.WhisperModel(transformers.WhisperConfig(**SIZES)).encoder.embed_positions.weight
    config = EncoderConfig(trunk='whisper', reads='sound', image_px=100, patch_px=2, width=32, n_latents=0, projection='none', vision_dim=32, prefixes=(32,))
    assert (build_encoder(config).trunk.positions - theirs).abs().max() < 1e-5


@pytest.mark.parametrize('bands, seconds', [(80, 2.7), (80, 31.5), (128, 30)])
def test_from_the_file_on(bands, seconds, tmp_path):
    """A sound file gives the tokens that transformers' feature extractor and encoder make of its samples: padded to 30 seconds, or cut."""
    model = whisper(num_mel_bins=bands, max_source_positions=1500)
    model.save_pretrained(tmp_path)
    samples = np.round(melody(3, seconds) * 32767) / 32768
    (tmp_path / 'a.wav').write_bytes(wav(samples * 32768 / 32767, 16000))
    spectrum = extractor(feature_size=bands, chunk_length=30)(samples.astype(np.float32), sampling_rate=16000, return_tensors='pt')['input_features']
    e = load_encoder(tmp_path)
    ours = picture_from(tmp_path / 'a.wav', e)
    assert ours.shape == (bands, 3000) and ours.dtype == torch.float32 and (ours - spectrum[0]).abs().max() < 1e-4
    tokens = e.encode_images(ours[None])
    assert tokens.shape == (1, 1500, 32) and (tokens - states(model, spectrum)).abs().max() < 1e-4


def test_pool_and_fewer_frames(folder):
    """`pool` averages neighbours in time; with fewer frames the beginning alone is heard; more than there are positions is an error."""
    spectra = torch.randn(2, 80, 100)
    whole = load_encoder(folder).encode_images(spectra)
    pooled = load_encoder(folder, pool=5).encode_images(spectra)
    assert pooled.shape == (2, 10, 32) and torch.allclose(pooled[:, 3], whole[:, 15:20].mean(1), atol=1e-6)
    with pytest.raises(ValueError, match='pool=3: expected a divisor of the 50 patches'):
        load_encoder(folder, pool=3)
    short = load_encoder(folder, image_px=40)
    assert short.open(wav(melody(), 16000)).shape == (80, 40) and short.encode_images(spectra[..., :40]).shape == (2, 20, 32)
    assert torch.equal(short.trunk.positions, load_encoder(folder).trunk.positions[:20])
    with pytest.raises(ValueError, match='image_px=200: expected 100 at most'):
        load_encoder(folder, image_px=200)


def test_a_resampler_follows(folder):
    """Stage 1 can take it as a trunk: its tokens go through an adapter, a Perceiver and a projection."""
    trunk = load_encoder(folder, pool=2)
    e = build_encoder(EncoderConfig(**vars(trunk.config) | dict(n_latents=4, adapter='linear', perceiver_width=16, perceiver_heads=2, projection='linear', vision_dim=8, prefixes=(4, 8))))
    e.trunk.load_state_dict(trunk.trunk.state_dict())
    spectra = torch.randn(2, 80, 100)
    with torch.no_grad():
        assert torch.allclose(e(spectra), e.resample(trunk(spectra)), atol=1e-5) and e(spectra).shape == (2, 4, 8)


def edited(folder, tmp_path, weights=None, **settings):
    """A copy of a folder with other weights or settings."""
    about = json.loads((folder / 'config.json').read_text()) | settings
    (tmp_path / 'config.json').write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    state = whisper().state_dict()
    torch.save(state if weights is None else weights(state), tmp_path / 'pytorch_model.bin')
    return tmp_path


@pytest.mark.parametrize('weights, problem', [
    (lambda state: {key: t for key, t in state.items() if key != 'encoder.conv2.bias'}, 'weights are missing: trunk.conv2.bias; left over: none'),
    (lambda state: {key: t for key, t in state.items() if not key.startswith('encoder.layers.1.')}, r'weights are missing: trunk.blocks.1.*left over: none'),
    (lambda state: {key: t for key, t in state.items() if key != 'encoder.layers.0.self_attn.q_proj.bias'}, 'weights are missing: trunk.blocks.0.qkv.bias; left over'),
    (lambda state: state | {'encoder.layers.2.fc1.bias': torch.zeros(48)}, 'left over: trunk.blocks.2.fc1.bias'),
    (lambda state: state | {'classifier.weight': torch.zeros(48)}, 'left over: classifier.weight'),
    (lambda state: state | {'encoder.conv1.weight': torch.zeros(32, 128, 3)}, 'do not fit its config(.|\n)*trunk.conv1.weight')])
def test_wrong_weights(weights, problem, folder, tmp_path):
    """Missing or left-over weights are an error that names them."""
    with pytest.raises(ValueError, match=problem):
        load_encoder(edited(folder, tmp_path, weights))


@pytest.mark.parametrize('settings, problem', [
    (dict(activation_function='relu'), 'config.json says activation_function relu: expected gelu'),
    (dict(num_mel_bins=None), 'config.json says num_mel_bins None: expected a number'), (dict(encoder_layers='2'), 'config.json says encoder_layers 2'),
    (dict(model_type='bart'), 'model_type bart: expected its folder')])
def test_wrong_config(settings, problem, folder, tmp_path):
    """A config.json that says something else than Whisper is refused, by the key."""
    with pytest.raises(ValueError, match=problem):
        load_encoder(edited(folder, tmp_path, **settings))


def test_other_refusals(folder, tmp_path):
    """Refused are weights without their config, spectra made otherwise, settings that only pictures have, and Whisper where pictures are to be seen."""
    edited(folder, tmp_path)
    extractor(hop_length=80).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='feature extractor says hop_length 80: expected 160'):
        load_encoder(tmp_path)
    (tmp_path / 'config.json').unlink()
    with pytest.raises(ValueError, match='no config.json beside them: expected its folder'):
        load_encoder(tmp_path)
    for changes in (dict(fit='crop'), dict(upright=False)):
        with pytest.raises(ValueError, match=f'{[*changes][0]}=.*Whisper hears'):
            load_encoder(folder, **changes)
    nothing = dict(fit=None, upright=None, activation=None, encoder_px=None)
    with pytest.raises(ValueError, match='an encoder that reads a sound, expected one that reads a picture'):
        open_encoder(folder, nothing)
    assert encoder_of_run('sound_encoder', dict(sound_encoder=folder)).config.trunk == 'whisper'
    with pytest.raises(ValueError, match='a.wav: not a sound'):
        (tmp_path / 'a.wav').write_bytes(b'nothing')
        picture_from(tmp_path / 'a.wav', load_encoder(folder))


def test_saved(folder, tmp_path):
    """Saved by this project it is read again without its folder, with its pooling; another Whisper has another fingerprint."""
    e = load_encoder(folder, pool=5)
    save_encoder(e, tmp_path / 'e.pt')
    again = load_encoder(tmp_path / 'e.pt')
    spectra = torch.randn(2, 80, 100)
    assert again.config == e.config and (again.encode_images(spectra) - e.encode_images(spectra)).abs().max() < .05
    save_encoder(again, tmp_path / 'f.pt')
    assert load_encoder(tmp_path / 'f.pt').fingerprint() == again.fingerprint()
    assert len({e.fingerprint(), again.fingerprint(), load_encoder(folder).fingerprint()}) == 3


def test_cache(folder, tmp_path, monkeypatch):
    """The tokens of sounds are computed once and kept; sounds are read in one piece or when they are asked for; a bad one is named."""
    monkeypatch.setattr('plumbing.features.fast_dtypes', lambda device: [torch.float32])
    e = load_encoder(folder, pool=5)
    sounds = Files(wav(melody(k), 16000) for k in range(5))
    order = torch.tensor([4, 1, 1])
    fresh = e.encode_images(torch.stack([e.preprocess(e.open(sounds[k])) for k in order]))
    assert fresh.std() > .1 and not torch.allclose(fresh[0], fresh[1], atol=.1)
    tokens = cached_features(e, sounds, tmp_path)[order]
    assert tokens.shape == (3, 10, 32) and (tokens.float() - fresh).abs().max() < 2e-3
    monkeypatch.setattr(Encoder, 'encode_images', None)  # nothing is encoded now
    assert torch.equal(cached_features(e, sounds, tmp_path)[order], tokens)
    asked = PixelReader(e, sounds)[order]
    kept = pixel_array(e, sounds)[order]
    assert asked.shape == (3, 80, 100) and asked.dtype == torch.float32 and kept.dtype == torch.float16
    assert torch.allclose(e(e.normalise(asked)), fresh, atol=1e-5)
    assert (e.normalise(kept) - asked).abs().max() < 1e-3
    sounds[2] = b'RIFF'
    for read in (pixel_array, partial(cached_features, cache_dir=tmp_path)):
        with pytest.raises(ValueError, match='1 of 5 sounds cannot be used: sound 2: not a sound'):
            read(e, sounds)


def test_a_name_of_the_hub(folder, tmp_path, monkeypatch):
    """What lies in the hub's local cache is read by its name, without the hub; its revision is known."""
    constants = pytest.importorskip('huggingface_hub').constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    root = tmp_path / 'cache/models--someone--whisper'
    (root / 'refs').mkdir(parents=True)
    (root / 'refs/main').write_text('a' * 40)
    shutil.copytree(folder, root / 'snapshots' / ('a' * 40))
    e = encoder_of_run('sound_encoder', dict(sound_encoder='someone/whisper'))
    assert e.source == f'someone/whisper@{"a" * 40}' and e.fingerprint() == load_encoder(folder).fingerprint()


def test_a_perceiver_behind_it(folder, tiny_shapes, tiny_encoder, tmp_path, monkeypatch):
    """Stage 1 trains a resampler behind the frozen trunk from the captions of sounds; its file then serves stage 2."""
    monkeypatch.setattr(judge.validate, '__defaults__', (4,))
    names = ('low', 'middle', 'high', 'higher')
    rows = [(split, dict(sound=wav(melody(k)), caption=f'a {names[k]} tone. it lasts.', question=None, answer=None, sample_id=str(k))) for split in SPLITS for k in range(4)]
    write_dataset(tmp_path / 'data', rows, SOUND_SCHEMA)
    align_main.main(['--reads=sound', '--captions=dataset', f'--dataset={tmp_path}/data', f'--trunk={folder}', '--n_latents=3', '--perceiver_layers=1', '--encoder_dim=16', '--text_width=32', '--max_steps=4',
                     '--eval_interval=4', '--batch_size=4', '--device=cpu', f'--cache_dir={tmp_path}/cache', f'--out_dir={tmp_path}/run'])
    e = encoder_of_run('sound_encoder', dict(sound_encoder=tmp_path / 'run/encoder.pt'))
    before = load_encoder(folder)
    assert e.config.trunk == 'whisper' and all(torch.equal(t.half(), before.state_dict()[key].half()) for key, t in e.state_dict().items() if key.startswith('trunk.'))
    (tmp_path / 'a.wav').write_bytes(wav(melody()))
    assert e.encode_images(picture_from(tmp_path / 'a.wav', e)[None]).shape == (1, 3, 16)
    with pytest.raises(ValueError, match='reads a sound, expected one that reads a picture'):
        align_main.main(['--captions=dataset', f'--dataset={tiny_shapes}', f'--trunk={folder}', f'--out_dir={tmp_path}/wrong'])
