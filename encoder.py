"""
The frozen vision encoder: a picture becomes a few tokens that language can be read from.

    pictures (B, 3, S, S) -> ViT trunk -> (B, P, W) -> resampler -> (B, N, W) -> projection -> (B, N, D)

The trunk has CLIP's form, or is a network of timm, or Whisper's encoder for sounds; the resampler turns its
P patches into N tokens, and the projection is Matryoshka: every listed prefix of the D dimensions is trained
to be an embedding of its own, so a decoder may read only the first `vision_dim` of them. `align/` trains it
against captions (stage 1); from then on it is frozen, encodes each picture once, and `plumbing/features.py`
keeps the result on disk (stage 2). `pretrained/` reads other people's weights.

    python encoder.py FILE...    # encode pictures, print shapes and timing
"""

import argparse
import hashlib
import math
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import expanded, expect
from plumbing.console import run_script
from plumbing.features import picture_from
from plumbing.files import DAMAGED, write_whole
from plumbing.machine import pick_device
from plumbing.pictures import as_seen, open_picture, squared
from plumbing.run import source_of
from plumbing.sounds import spectrum, spectrum_picture
from pretrained.clip import CLIP_MEAN, CLIP_STD, EDGE_GLASS_PREFIXES, read_clip
from pretrained.files import as_tensor, first_few, open_weights
from pretrained.hub import folder_of, is_hub_name
from pretrained.timm_trunk import PREFIX, TimmTrunk, read_timm
from pretrained.whisper import WhisperTrunk, check_hears, is_whisper, read_whisper


@dataclass
class EncoderConfig:
    trunk: str = 'vit'                      # 'vit': the one below; 'timm/NAME': of timm; 'whisper'
    image_px: int = 64                      # side of the square picture, in pixels; Whisper: frames of 10 ms
    patch_px: int = 8                       # side of a patch, in pixels
    stem: str = 'conv'                      # 'conv': strided 3x3 ones; 'patch': one of patch_px (CLIP)
    width: int = 128                        # W, width of the trunk
    n_layer: int = 2                        # layers of the trunk
    n_head: int = 4                         # attention heads of the trunk
    mlp_width: int | None = None            # of the trunk's MLPs; None: 4 W
    activation: str = 'gelu'                # 'gelu' or 'quick_gelu' (OpenAI's CLIP)
    class_token: bool = False               # CLIP's
    keep_class_token: bool = False          # it is the first token; false: it is dropped after the trunk
    pool: int = 1                           # patches are averaged pool x pool after the trunk
    adapter: str = 'none'                   # between trunk and resampler: 'none', 'linear' or 'mlp'
    adapter_width: int = 2048               # of the adapter's MLP
    n_latents: int = 16                     # N, tokens of a picture; 0: no resampler, they are patches
    perceiver_layers: int = 2               # layers of the resampler
    perceiver_width: int | None = None      # of the resampler; None: W
    perceiver_heads: int | None = None      # of the resampler; None: n_head
    projection: str = 'linear'              # after the resampler: 'none', 'linear' or 'norm_linear'
    vision_dim: int = 128                   # D, dimensions of a token
    prefixes: tuple = (16, 32, 64, 128)     # Matryoshka: each of these prefixes of D is an embedding
    mean: tuple = (0.5, 0.5, 0.5)           # of a channel, pixels 0..1
    std: tuple = (0.25, 0.25, 0.25)         # of a channel, pixels 0..1
    fit: str = 'squash'                     # how it becomes square: 'squash', 'crop' its middle, 'pad'
    crop_pct: float = 1.0                   # of its side the middle that is seen, once it is fitted
    interpolation: str = 'bicubic'          # how it is made smaller: 'bicubic', 'bilinear' or 'lanczos'
    upright: bool = True                    # turn photographs as their EXIF orientation says
    reads: str = 'picture'                  # or 'sound': files whose spectrum is the picture
    bands: int = 80                         # of the spectrum that Whisper hears

    def __post_init__(self):
        expect(self, stem=('conv', 'patch'), activation=('gelu', 'quick_gelu'),
               adapter=('none', 'linear', 'mlp'), projection=('none', 'linear', 'norm_linear'),
               fit=('squash', 'crop', 'pad'), interpolation=('bicubic', 'bilinear', 'lanczos'),
               reads=('picture', 'sound'))
        if self.trunk == 'whisper':
            check_hears(self)
        if self.trunk == 'vit' and self.image_px % self.patch_px:
            raise ValueError(f'image_px={self.image_px}: expected a multiple of patch_px={self.patch_px}')
        if not self.prefixes or min(self.prefixes) < 1 or max(self.prefixes) != self.vision_dim:
            raise ValueError(f'prefixes={self.prefixes}: expected numbers up to '
                             f'vision_dim={self.vision_dim}, and that one among them')
        if self.width % 4 or self.width % self.n_head:
            raise ValueError(f'width={self.width}: expected a multiple of 4 and of n_head={self.n_head}')
        inner = self.inner_width
        if self.n_latents and inner % self.inner_heads:
            raise ValueError(f'perceiver_width={inner}: expected a multiple of '
                             f'perceiver_heads={self.inner_heads}')
        if self.adapter == 'none' and inner != self.width:
            raise ValueError(f"perceiver_width={inner}: another width than the trunk's, {self.width}, "
                             'needs an adapter')
        if self.projection == 'none' and self.vision_dim != inner:
            raise ValueError(f'vision_dim={self.vision_dim}: without a projection it is the width, {inner}')
        if self.pool < 1 or self.side % self.pool or self.pool > 1 and self.keep_class_token:
            raise ValueError(f'pool={self.pool}: expected a divisor of the {self.side} patches of a side, '
                             'and 1 with keep_class_token')

    @property
    def side(self):
        """Patches along a side of the picture; the last one of a network of timm may stand over."""
        return -(-self.image_px // self.patch_px)

    @property
    def n_patches(self):
        """P, as the trunk gives them: in a square, or one after another in time."""
        return self.side if self.trunk == 'whisper' else self.side ** 2

    @property
    def input_shape(self):
        """Of what the trunk takes: colours, rows and columns; or pitch and time."""
        if self.trunk == 'whisper':
            return self.bands, self.image_px
        return 3, self.image_px, self.image_px

    @property
    def inner_width(self):
        """Of the resampler, after the adapter."""
        return self.perceiver_width or self.width

    @property
    def inner_heads(self):
        """Of the resampler."""
        return self.perceiver_heads or self.n_head


def attention(q, k, v, n_head, seen=None, watch=None):
    """Multi-head attention, written out.

    Shapes: q (B, T, W), k and v (B, S, W), seen (B, S) bool or None; watch, a list that gets the weights
        (B, nh, T, S) -> (B, T, W)
    """
    B, T, W = q.shape
    q = q.view(B, -1, n_head, W // n_head).transpose(1, 2)                             # (B, nh, T, hs)
    k = k.view(B, -1, n_head, W // n_head).transpose(1, 2)                             # (B, nh, S, hs)
    v = v.view(B, -1, n_head, W // n_head).transpose(1, 2)                             # (B, nh, S, hs)
    att = q @ k.transpose(-2, -1) / math.sqrt(W // n_head)                             # (B, nh, T, S)
    if seen is not None:
        att = att.masked_fill(~seen[:, None, None, :], -torch.inf)
    att = att.softmax(-1)
    if watch is not None:
        watch.append(att)
    return (att @ v).transpose(1, 2).reshape(B, T, W)                                  # (B, T, W)


class Block(nn.Module):
    """A pre-norm transformer block, as in CLIP's trunk."""

    def __init__(self, width, n_head, activation='gelu', mlp_width=None):
        super().__init__()
        mlp_width = mlp_width or 4 * width
        self.n_head = n_head
        self.activation = activation
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x, seen=None):
        """Shapes: x (B, T, W), seen (B, T) bool or None -> (B, T, W)."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)                             # (B, T, W) each
        x = x + self.out(attention(q, k, v, self.n_head, seen))
        h = self.fc1(self.norm2(x))
        if self.activation == 'quick_gelu':  # OpenAI's CLIP needs it: with gelu its tokens are off
            h = h * torch.sigmoid(1.702 * h)
        elif self.activation == 'gelu':
            h = F.gelu(h)
        else:
            raise ValueError(f'activation={self.activation}: expected gelu or quick_gelu')
        return x + self.fc2(h)


class Reader(nn.Module):
    """Lets some tokens read others: a layer of the Perceiver. Source: Edge-Glass (one norm for both)."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, source, watch=None):
        """Shapes: x (B, T, W), source (B, S, W) -> (B, T, W)."""
        k, v = self.to_kv(self.norm1(source)).chunk(2, dim=-1)                         # (B, S, W) both
        x = x + self.out(attention(self.to_q(self.norm1(x)), k, v, self.n_head, watch=watch))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def sinusoids_2d(side, width, extent=None):
    """Places on a side x side grid over `extent` patches, as sines and cosines of row and column.
    -> (side * side, width)"""
    extent = extent or side
    freqs = 20 ** -(torch.arange(width // 4) / (width // 4))  # wavelengths 6 to 120 patches
    axis = (torch.arange(side) + .5) * extent / side
    row, col = torch.meshgrid(axis, axis, indexing='ij')                               # (side, side) both
    waves = []
    for place in (row, col):
        angles = place.reshape(-1, 1) * freqs                                          # (side ** 2, width/4)
        waves += [torch.sin(angles), torch.cos(angles)]
    return torch.cat(waves, dim=1) * 2 ** .5                                           # (side ** 2, width)


def conv_stem(width, patch_px):
    """Halves the picture until a patch is a pixel, then looks around once more."""
    widths = [3] + [width * 2 ** i // patch_px for i in range(1, patch_px.bit_length())]
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
    layers.append(nn.Conv2d(width, width, 3, padding=1))
    stem = nn.Sequential(*layers)
    return stem.to(memory_format=torch.channels_last)  # faster, and a patch's channels come out side by side


class ViT(nn.Module):
    """The trunk: patches, a class token or none, learned positions, a norm, blocks, no last norm.
    Source: CLIP (Radford 2021)."""

    def __init__(self, config):
        super().__init__()
        W = config.width
        self.keep_class_token = config.keep_class_token
        if config.stem == 'conv':
            self.patches = conv_stem(W, config.patch_px)
        elif config.stem == 'patch':
            self.patches = nn.Conv2d(3, W, config.patch_px, config.patch_px, bias=False)
        else:
            raise ValueError(f'stem={config.stem}: expected conv or patch')
        self.class_token = nn.Parameter(torch.randn(W)) if config.class_token else None
        positions = sinusoids_2d(config.side, W)  # unit scale: positions drawn at .02 drown in the content
        if config.class_token:
            positions = torch.cat([torch.zeros(1, W), positions])                      # (1 + P, W)
        self.positions = nn.Parameter(positions)
        self.norm = nn.LayerNorm(W)
        self.blocks = nn.ModuleList(Block(W, config.n_head, config.activation, config.mlp_width)
                                    for _ in range(config.n_layer))

    def forward(self, images):
        """Shapes: (B, 3, S, S) -> (B, P, W), with a class token first where it is kept."""
        x = self.patches(images).flatten(2).transpose(1, 2)                            # (B, P, W)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)          # (B, 1 + P, W)
        # CLIP's first norm; its last one is for the class token's embedding, and is left out
        x = self.norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        if self.class_token is None or self.keep_class_token:
            return x
        return x[:, 1:]                                                                # (B, P, W)


class Perceiver(nn.Module):
    """The resampler: N learned latents read the patches, layer by layer. Source: Jaegle 2021; form of
    Edge-Glass: latents read the patches only, one norm serves both, and no positions are added."""

    def __init__(self, config):
        super().__init__()
        W = config.inner_width
        side = math.isqrt(config.n_latents)
        # latents start spread over the picture, one looking at each part of it
        if side * side == config.n_latents:
            self.latents = nn.Parameter(sinusoids_2d(side, W, config.side))
        else:
            self.latents = nn.Parameter(torch.randn(config.n_latents, W))
        self.layers = nn.ModuleList(Reader(W, config.inner_heads) for _ in range(config.perceiver_layers))
        self.norm = nn.LayerNorm(W)
        # like reads like: at the start a latent reads the patches around its own place
        for layer in self.layers:
            nn.init.orthogonal_(layer.to_q.weight, gain=1.5)
            layer.to_kv.weight.data[:W] = layer.to_q.weight.data

    def forward(self, x, watch=None):
        """Shapes: (B, P, W) -> (B, N, W)."""
        latents = self.latents.expand(len(x), -1, -1)                                  # (B, N, W)
        for layer in self.layers:
            latents = layer(latents, x, watch)
        return self.norm(latents)


def make_trunk(config):
    """What turns pictures into patches: (B, 3, S, S) -> (B, P, W), P = side ** 2, row by row; a ViT may keep
    its class token before them. Whisper turns spectra into them: (B, bands, frames) -> (B, P, W)."""
    if config.trunk == 'vit':
        return ViT(config)
    if config.trunk.startswith(PREFIX):
        return TimmTrunk(config.trunk, config.image_px)
    if config.trunk == 'whisper':
        return WhisperTrunk(config, Block)
    raise ValueError(f'trunk={config.trunk}: expected vit, whisper or {PREFIX}NAME')


def make_adapter(config):
    """What leads from the trunk's width W to the resampler's."""
    if config.adapter == 'none':
        return nn.Identity()
    if config.adapter == 'linear':
        return nn.Linear(config.width, config.inner_width)
    if config.adapter == 'mlp':
        return nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.adapter_width),
                             nn.GELU(), nn.Linear(config.adapter_width, config.inner_width))
    raise ValueError(f'adapter={config.adapter}: expected none, linear or mlp')


def make_projection(config):
    """What leads from the resampler's width to D."""
    if config.projection == 'none':
        return nn.Identity()
    last = nn.Linear(config.inner_width, config.vision_dim)
    if config.projection == 'linear':
        return last
    if config.projection == 'norm_linear':
        return nn.Sequential(nn.LayerNorm(config.inner_width), last)
    raise ValueError(f'projection={config.projection}: expected none, linear or norm_linear')


class Encoder(nn.Module):
    """Trunk, resampler and projection: pictures in, tokens out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = None  # where it was read from, with its revision, if that is the hub
        self.trunk = make_trunk(config)
        self.adapter = make_adapter(config)
        self.resampler = Perceiver(config) if config.n_latents else nn.Identity()
        self.projection = make_projection(config)
        # of pixels, by colour; on the device already, so that `normalise` waits for no copy
        self.register_buffer('mean', torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """Shapes: (B, 3, S, S), normalised as `preprocess` does, -> (B, N, D)."""
        return self.resample(self.patches(images))

    def patches(self, images):
        """The trunk's part. Shapes: (B, 3, S, S) -> (B, P, W)."""
        x = self.trunk(images)                                                         # (B, P, W)
        return self.pooled(x) if self.config.pool > 1 else x

    def pooled(self, x):
        """Averaged pool x pool. Shapes: (B, side ** 2, W) -> (B, P, W)"""
        side = self.config.side
        x = x.transpose(1, 2).unflatten(2, (side, side))                               # (B, W, side, side)
        return F.avg_pool2d(x, self.config.pool).flatten(2).transpose(1, 2)            # (B, P, W)

    def resample(self, patches):
        """What follows the trunk. Shapes: (B, P, W) -> (B, N, D)."""
        return self.projection(self.resampler(self.adapter(patches)))

    def open(self, data):
        """The bytes of a file -> a Pillow picture. Raises: ValueError."""
        if self.config.reads == 'sound':
            return spectrum_picture(data)
        return open_picture(data, side=self.config.image_px)

    def preprocess(self, picture):
        """A Pillow picture of any mode and size -> a normalised float tensor (3, S, S), on the encoder's
        device."""
        return self.normalise(self.pixels(picture).to(self.mean.device))

    def pixels(self, picture):
        """A Pillow picture of any size and mode but floats -> uint8 (3, S, S), made square as `fit` says.

        Source: CLIPImageProcessorPil of transformers 5, and timm's own transforms for its networks, which
        it equals bit by bit but for 'upright', and for JPEGs that `open` decodes at half size or less.
        Raises: ValueError.
        """
        c = self.config
        picture = as_seen(picture, turn=c.upright)
        mean_color = tuple(round(255 * m) for m in c.mean)  # after `normalise` it is about 0
        picture = squared(picture, c.image_px, c.fit, border=mean_color, crop_pct=c.crop_pct,
                          interpolation=c.interpolation, half_to_even=c.trunk != 'vit')
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)                    # (3, S, S)

    def normalise(self, pixels):
        """Shapes: uint8 (..., 3, S, S), 0..255 -> float of that shape, about zero mean and unit spread."""
        return (pixels.float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def encode_images(self, images):
        """Shapes: (B, 3, S, S) -> (B, N, D), without gradient, `at_once` at a time."""
        return torch.cat([self(part) for part in images.split(self.at_once)])

    @property
    def at_once(self):
        """How many pictures to encode at a time: a layer's attention then takes 0.25 GB at most, on a GPU,
        which few pictures would not fill, 1 GB."""
        numbers = 2 ** 28 if self.mean.is_cuda else 2 ** 26  # of four bytes each
        # n_head maps of P x P
        return max(1, min(64, numbers // (self.config.n_head * self.config.n_patches ** 2)))

    def fingerprint(self):
        """A short hash of the config and the weights: what its tokens depend on."""
        # defaults are left out: a setting that comes later does not change the fingerprints of before
        settings = []
        for field in fields(EncoderConfig):
            value = getattr(self.config, field.name)
            if value != field.default:
                settings.append((field.name, value))
        digest = hashlib.sha256(repr(sorted(settings)).encode())
        for key, t in sorted(self.state_dict().items()):
            digest.update(key.encode() + t.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]


class WhisperEncoder(Encoder):
    """With Whisper's trunk. In place of a picture it has a spectrum, floats (bands, frames), as it is: in 8
    bits its tokens would be off."""

    def open(self, data):
        return spectrum(data, *self.config.input_shape)                                # (bands, frames)

    def pixels(self, spectrum):
        return torch.from_numpy(spectrum)                                              # (bands, frames)

    def normalise(self, pixels):
        return pixels.float()

    def pooled(self, x):
        """Averaged along time."""
        return x.unflatten(1, (-1, self.config.pool)).mean(2)                          # (B, P, W)


def build_encoder(config):
    """An encoder with random weights, drawn from torch's current seed."""
    return WhisperEncoder(config) if config.trunk == 'whisper' else Encoder(config)


# ----------------------------------------------------------------------------
# files

FORMAT = 1  # of encoder files; raised when their content changes

EDGE_GLASS_CONFIG = EncoderConfig(  # CLIP ViT-L/14 at 336 pixels, 64 latents, 4096 dimensions
    image_px=336, patch_px=14, stem='patch', width=1024, n_layer=24, n_head=16, activation='quick_gelu',
    class_token=True, adapter='linear', n_latents=64, perceiver_layers=4, perceiver_heads=8, vision_dim=4096,
    prefixes=EDGE_GLASS_PREFIXES, mean=CLIP_MEAN, std=CLIP_STD)


# of spectra, which are mostly black: so small that a decoder trains it along. Its tokens are the patches,
# each a place in time and pitch: latents would first have to learn where to look
SOUND_CONFIG = EncoderConfig(reads='sound', width=64, n_layer=1, n_latents=0, mean=(0.2,) * 3)


def save_encoder(encoder, path):
    """Writes an encoder in half precision: config and weights, tensors and plain types only."""
    weights = {key: t.half().cpu() for key, t in encoder.state_dict().items()}
    content = dict(format=FORMAT, kind='encoder', config=asdict(encoder.config), weights=weights)
    write_whole(path, partial(torch.save, content))


def load_encoder(path, **changes):
    """Reads an encoder: one that `save_encoder` wrote, or CLIP as Hugging Face (a folder, or its weights
    file), OpenAI or open_clip store it, or an aligned checkpoint of Edge-Glass: which one it is, its content
    says. Or Whisper's encoder, as Hugging Face stores it. Or a network of timm, by its name, `timm/NAME` or
    `timm/NAME@FILE`; or CLIP or Whisper by its name on the hub.
    A relative path is also looked up beside this file.

    CLIP, Whisper and timm have no resampler: their tokens are the last hidden states. `changes` are
    settings of `EncoderConfig` that shall differ from what is read: activation, fit, upright, pool, n_head,
    perceiver_heads, image_px (the positions are interpolated; Whisper's are cut).
    Raises: FileNotFoundError; ValueError for another kind of file and for weights that are missing or left
        over, which it names.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    config, tensors, source = read_encoder(path, changes)
    if changes.get('fit', config.get('fit')) != config.get('fit'):
        config['crop_pct'] = 1.0  # it belongs to the fit that it came with
    try:
        config = EncoderConfig(**config | changes)
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None
    check_names(path, tensors.keys(), config)  # first: a wrong file is refused before all of it is read
    try:
        weights = {key: as_tensor(t).float() for key, t in tensors.items()}
    except (ValueError, *DAMAGED) as e:
        raise ValueError(f'{path}: damaged ({e})') from None
    if config.trunk == 'vit':
        weights['trunk.positions'] = fit_positions(weights['trunk.positions'], config)
    elif config.trunk == 'whisper':  # with fewer frames it hears the beginning alone
        positions = weights['trunk.positions']                                         # (P, W)
        if len(positions) < config.side:
            raise ValueError(f'{path}: image_px={config.image_px}: expected {2 * len(positions)} at most, '
                             'the frames that it has positions for')
        weights['trunk.positions'] = positions[:config.side]
    encoder = build_encoder(config)
    encoder.source = source
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f'{path}: its weights do not fit its config: {e}') from None
    return encoder.eval().requires_grad_(False)


def read_encoder(path, changes):
    """What a path or name stands for -> its config (a dict), its tensors, or functions that read them, by
    name; and where on the hub it is from, with its revision, or None. Raises: as `load_encoder`."""
    if str(path).startswith(PREFIX):
        return read_timm(path, changes.get('image_px'))
    found = Path(path) if Path(path).exists() else Path(__file__).parent / path
    source = None
    if not found.exists() and is_hub_name(path):
        found, source = folder_of(path)
    if not found.exists():
        raise FileNotFoundError(f'{path}: no such encoder file or folder; --encoder=PATH takes CLIP, '
                                'a checkpoint of Edge-Glass, or what python -m align config/align.py makes; '
                                '--sound_encoder=PATH takes Whisper')
    tensors, about = open_weights(found)
    if about.get('kind') != 'encoder':
        if is_whisper(found, tensors):
            config, tensors = read_whisper(found, tensors, title=path)
        else:
            config, tensors = read_clip(found, tensors, about, title=path)
        return config, tensors, source
    if about.get('format') != FORMAT:
        raise ValueError(f'{path}: an encoder file of format {about.get("format")}, '
                         f'this code reads format {FORMAT}')
    return about['config'], tensors, source


def check_names(path, names, config):
    """Raises: ValueError where the names of the weights are not those of an encoder of this config."""
    with torch.device('meta'):  # without memory, nor any number drawn
        expected = Encoder(config).state_dict().keys()
    if names != expected:
        missing = first_few(expected - names) or 'none'
        left_over = first_few(names - expected) or 'none'
        raise ValueError(f'{path}: weights are missing: {missing}; left over: {left_over}')


def open_encoder(path, settings, reads='picture', **more):
    """`load_encoder` with what the settings of a run, a dict, change of it."""
    changes = {key: settings[key] for key in ('fit', 'upright', 'activation')}
    encoder = load_encoder(path, image_px=settings['encoder_px'], **changes, **more)
    return check_reads(encoder, path, reads)


def encoder_names(settings):
    """The settings that name the encoders of a run: of pictures where it sees, of sounds where it hears."""
    used = dict(encoder='use_vision', sound_encoder='use_sound')
    return [name for name, flag in used.items() if settings.get(flag)]  # runs of before have no use_sound


def encoder_of_run(name, settings, saved=None):
    """One of `encoder_names`; that of sounds is a small one with random weights where it has no file.
    `settings`: those of the run, a dict; `saved`: its checkpoint. Raises: as `load_encoder`."""
    path = source_of(settings[name], saved, name)
    if name == 'encoder':
        return open_encoder(path, settings)
    if path is None:
        return Encoder(SOUND_CONFIG)
    return check_reads(load_encoder(path), path, 'sound')


def check_reads(encoder, path, kind):
    """-> the encoder. Raises: ValueError where it reads something else."""
    if encoder.config.reads != kind:
        raise ValueError(f'{path}: an encoder that reads a {encoder.config.reads}, expected one that reads a '
                         f'{kind}')
    return encoder


def fit_positions(positions, config):
    """Learned positions, interpolated where there are more or fewer patches now.

    Shapes: (P, W) -> (P', W), each with one row more where there is a class token
    """
    first = positions[:config.class_token]                                             # (1 or 0, W)
    grid = positions[config.class_token:]                                              # (P, W)
    old = math.isqrt(len(grid))
    new = config.side
    if old == new:
        return positions
    print(f'encoder: pictures of {config.image_px} pixels, its positions interpolated from {old} x {old} to '
          f'{new} x {new} patches')
    grid = grid.T.view(1, -1, old, old)                                                # (1, W, old, old)
    grid = F.interpolate(grid, (new, new), mode='bicubic', antialias=new < old)
    return torch.cat([first, grid.view(-1, new * new).T])                              # (1 or 0 + P', W)


def main(argv):
    """Encodes pictures and shows what comes out."""
    parser = argparse.ArgumentParser(description='Encode pictures with a frozen encoder.')
    parser.add_argument('pictures', nargs='+', help='picture files')
    parser.add_argument('--encoder', default='assets/encoder_shapes.pt', type=partial(expanded, 'encoder'),
                        help="encoder file or folder: this project's, CLIP, a checkpoint of Edge-Glass; or a "
                             'name: OWNER/NAME of the hub, timm/NAME (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto (a GPU if there is one), cpu, cuda, ...')
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    encoder = load_encoder(args.encoder).to(device)
    n_parameters = sum(p.numel() for p in encoder.parameters())
    print(f'{args.encoder} | {n_parameters:,} parameters | fingerprint {encoder.fingerprint()}')
    for file in args.pictures:
        images = picture_from(file, encoder)[None]                                     # (1, 3, S, S)
        start = time.time()
        tokens = encoder.encode_images(images).cpu()                                   # (1, N, D)
        ms = 1e3 * (time.time() - start)
        print(f'{file} | {tuple(images.shape)} -> {tuple(tokens.shape)} | {ms:.1f} ms')


if __name__ == '__main__':
    run_script(main)
