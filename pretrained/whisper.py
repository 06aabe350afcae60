"""
Whisper's encoder, as Hugging Face stores it: a trunk that hears, its tensors under our names, and its config.

`read_whisper` is the way in. Of a whole Whisper the decoder is left alone. A sound is 30 seconds long for it:
`plumbing.sounds.spectrum` pads or cuts it.
"""

import math
import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.sounds import HOP, RATE, WINDOW
from pretrained.clip import substituted, with_joined_qkv
from pretrained.files import read_beside

SIZES = {  # what config.json calls a size: what encoder.EncoderConfig calls it
    'd_model': 'width',
    'encoder_layers': 'n_layer',
    'encoder_attention_heads': 'n_head',
    'encoder_ffn_dim': 'mlp_width',
    'num_mel_bins': 'bands',
    'max_source_positions': 'positions',
}

NAMES = {  # Whisper's tensors: our names
    r'embed_positions\.weight': 'positions',
    r'^layers': 'blocks',
    r'self_attn_layer_norm': 'norm1',
    r'final_layer_norm': 'norm2',
    r'^layer_norm': 'norm',
    r'self_attn\.([qkv])_proj': r'\1',
    r'self_attn\.out_proj': 'out',
}

ROOTS = ('model.encoder.', 'encoder.', '')  # what the encoder's names begin with, alone or in a whole Whisper

DECODER = r'(model\.)?decoder\..*|proj_out\.weight'


class WhisperTrunk(nn.Module):
    """Two convolutions along time, fixed positions, blocks, a last norm. Source: Whisper (Radford 2022, arXiv
    2212.04356). Its hidden states equal those of transformers' WhisperEncoder."""

    def __init__(self, config, block):
        """block: the class of its blocks, `encoder.Block`."""
        super().__init__()
        W = config.width
        self.conv1 = nn.Conv1d(config.bands, W, 3, padding=1)
        self.conv2 = nn.Conv1d(W, W, 3, stride=2, padding=1)
        self.register_buffer('positions', sinusoids(config.side, W))
        self.blocks = nn.ModuleList(block(W, config.n_head, config.activation, config.mlp_width)
                                    for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(W)

    def forward(self, spectra):
        """Shapes: (B, bands, frames) -> (B, P, W), P = frames / 2."""
        x = F.gelu(self.conv1(spectra))                                # (B, W, frames)
        x = F.gelu(self.conv2(x)).transpose(1, 2)                      # (B, P, W)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def sinusoids(n, width):
    """n places in time: half of the width their sines, half their cosines, at wavelengths from 6 to 60,000
    tokens. Shapes: -> (n, width)"""
    half = width // 2
    freqs = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
    angles = torch.arange(n).view(-1, 1) * freqs                       # (n, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)              # (n, width)


def check_hears(config):
    """Raises: ValueError where the EncoderConfig of a Whisper has settings that only pictures need."""
    for key, value in dict(reads='sound', patch_px=2, fit='squash', upright=True, activation='gelu').items():
        if getattr(config, key) != value:
            raise ValueError(f'{key}={getattr(config, key)}: Whisper hears, with it {key} stays {value}')


def is_whisper(path, tensors):
    """Whether weights that `open_weights` opened are Whisper's: config.json says so, or their names."""
    if read_beside(path, 'config.json').get('model_type') == 'whisper':
        return True
    return any(f'{root}layers.0.self_attn_layer_norm.weight' in tensors for root in ROOTS)


def read_whisper(path, tensors, title):
    """The config of an encoder (a dict), and its weights under the names of `encoder.Encoder`'s.

    `path` and `tensors` as `open_weights` takes and gives them; `title` is what messages call the file.
    Tensors that are not known keep their names.
    Raises: ValueError.
    """
    config = config_of(title, read_beside(path, 'config.json'))
    # transformers 5 writes the first one alone
    extractor = read_beside(path, 'processor_config.json').get('feature_extractor')
    if not isinstance(extractor, dict):
        extractor = read_beside(path, 'preprocessor_config.json')
    check_spectrum(title, extractor, config['bands'])
    root = next(root for root in ROOTS if root == '' or any(key.startswith(root) for key in tensors))
    weights = {}
    for key, t in tensors.items():
        if re.fullmatch(DECODER, key):
            continue
        if key.startswith(root):
            key = 'trunk.' + substituted(key.removeprefix(root), NAMES)
        weights[key] = t
    # keys have no bias in Whisper: it would change all weights of a softmax alike
    for name in list(weights):
        if name.endswith('.k.weight'):
            weights[name.replace('.k.weight', '.k.bias')] = partial(torch.zeros, config['width'])
    return config, with_joined_qkv(weights)


def config_of(title, about):
    """The config of an encoder (a dict). about: of config.json, {} without one. Raises: ValueError."""
    if not about:
        raise ValueError(f'{title}: weights of Whisper, and no config.json beside them: expected its folder')
    if about.get('model_type') != 'whisper':
        raise ValueError(f'{title}: weights of Whisper, and config.json beside them says model_type '
                         f'{about.get("model_type")}: expected its folder, with a config.json of whisper')
    for key in SIZES:
        if type(about.get(key)) is not int or about[key] < 1:
            raise ValueError(f'{title}: config.json says {key} {about.get(key)}: expected a number from 1 on')
    activation = about.get('activation_function', 'gelu')
    if activation != 'gelu':
        raise ValueError(f'{title}: config.json says activation_function {activation}: expected gelu')
    config = {ours: about[key] for key, ours in SIZES.items()}
    width = config['width']
    frames = 2 * config.pop('positions')
    return config | dict(trunk='whisper', reads='sound', image_px=frames, patch_px=2, n_latents=0,
                         projection='none', vision_dim=width, prefixes=(width,))


def check_spectrum(title, extractor, bands):
    """Raises: ValueError where the spectra that it was trained on are not made as `log_mel` makes them.
    extractor: what the files beside the weights say of them, {} without any."""
    made_of = dict(feature_size=bands, sampling_rate=RATE, n_fft=WINDOW, hop_length=HOP, dither=0)
    for key, value in made_of.items():
        if extractor.get(key, value) != value:
            raise ValueError(f'{title}: the config of its feature extractor says {key} {extractor[key]}: '
                             f'expected {value}')
