"""
The frozen vision encoder: a picture becomes a few tokens that language can be read from.

    pictures (B, 3, S, S) -> ViT trunk -> (B, P, W) -> Perceiver resampler -> (B, N, W) -> projection -> (B, N, D)

The trunk has CLIP's form, the resampler turns its P patches into N tokens, and the projection is Matryoshka: every listed
prefix of the D dimensions is trained to be an embedding of its own, so a decoder may read only the first `vision_dim` of them.
`AlignModel` trains the encoder against captions (stage 1); from then on it is frozen, encodes each picture once, and
`cached_features` keeps the result on disk (stage 2).

    python encoder.py FILE...    # encode pictures, print shapes and timing
    python encoder.py --bench=16 # pictures per second and memory at the scale of Edge-Glass
"""

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from configurator import expect, fast_dtypes, locked, most_memory, pick_device, progress, run_script, seconds, write_whole


@dataclass
class EncoderConfig:
    image_px: int = 64                      # side of the square picture, in pixels
    patch_px: int = 8                       # side of a patch, in pixels
    stem: str = 'conv'                      # 'conv': strided 3x3 convolutions; 'patch': one patch_px convolution (CLIP)
    width: int = 128                        # W, width of the trunk
    n_layer: int = 2                        # layers of the trunk
    n_head: int = 4                         # attention heads of the trunk
    mlp_width: int | None = None            # of the trunk's MLPs; None: 4 W
    activation: str = 'gelu'                # 'gelu' or 'quick_gelu' (OpenAI's CLIP)
    class_token: bool = False               # CLIP's
    keep_class_token: bool = False          # it is the first token; false: it is dropped behind the trunk
    pool: int = 1                           # patches are averaged pool x pool behind the trunk
    adapter: str = 'none'                   # between trunk and resampler: 'none', 'linear' or 'mlp'
    adapter_width: int = 2048               # of the adapter's MLP
    n_latents: int = 16                     # N, tokens of a picture; 0: no resampler, the patches are the tokens
    perceiver_layers: int = 2               # layers of the resampler
    perceiver_width: int | None = None      # of the resampler; None: W
    perceiver_heads: int | None = None      # of the resampler; None: n_head
    projection: str = 'linear'              # behind the resampler: 'none', 'linear' or 'norm_linear'
    vision_dim: int = 128                   # D, dimensions of a token
    prefixes: tuple = (16, 32, 64, 128)     # Matryoshka: each of these prefixes of D is an embedding
    mean: tuple = (0.5, 0.5, 0.5)           # of a channel, pixels 0..1
    std: tuple = (0.25, 0.25, 0.25)         # of a channel, pixels 0..1
    fit: str = 'squash'                     # how a picture becomes square: 'squash', 'crop' its middle, 'pad' it with gray
    upright: bool = True                    # turn photographs as their EXIF orientation says

    def __post_init__(self):
        expect(self, stem=('conv', 'patch'), activation=('gelu', 'quick_gelu'), adapter=('none', 'linear', 'mlp'),
               projection=('none', 'linear', 'norm_linear'), fit=('squash', 'crop', 'pad'))
        if self.image_px % self.patch_px:
            raise ValueError(f'image_px={self.image_px}: expected a multiple of patch_px={self.patch_px}')
        if not self.prefixes or min(self.prefixes) < 1 or max(self.prefixes) != self.vision_dim:
            raise ValueError(f'prefixes={self.prefixes}: expected numbers up to vision_dim={self.vision_dim}, and that one among them')
        inner, heads = self.perceiver_width or self.width, self.perceiver_heads or self.n_head
        if self.width % 4 or self.width % self.n_head:
            raise ValueError(f'width={self.width}: expected a multiple of 4 and of n_head={self.n_head}')
        if self.n_latents and inner % heads:
            raise ValueError(f'perceiver_width={inner}: expected a multiple of perceiver_heads={heads}')
        if self.adapter == 'none' and inner != self.width:
            raise ValueError(f'perceiver_width={inner}: another width than the trunk\'s, {self.width}, needs an adapter')
        if self.projection == 'none' and self.vision_dim != inner:
            raise ValueError(f'vision_dim={self.vision_dim}: without a projection it is the width, {inner}')
        if self.pool < 1 or self.image_px // self.patch_px % self.pool or self.pool > 1 and self.keep_class_token:
            raise ValueError(f'pool={self.pool}: expected a divisor of the {self.image_px // self.patch_px} patches of a side, and 1 with keep_class_token')


def attention(q, k, v, n_head, seen=None, watch=None):
    """Multi-head attention, written out. Shapes: q (B, T, W), k and v (B, S, W), seen (B, S) bool or None;
    watch, a list that gets the weights (B, nh, T, S) -> (B, T, W)."""
    B, T, W = q.shape
    q, k, v = (t.view(B, -1, n_head, W // n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T or S, hs)
    att = q @ k.transpose(-2, -1) / math.sqrt(W // n_head)                             # (B, nh, T, S)
    if seen is not None:
        att = att.masked_fill(~seen[:, None, None, :], -torch.inf)
    att = att.softmax(-1)
    if watch is not None:
        watch.append(att)
    return (att @ v).transpose(1, 2).reshape(B, T, W)


class Block(nn.Module):
    """A pre-norm transformer block, as in CLIP's trunk."""

    def __init__(self, width, n_head, activation='gelu', mlp_width=None):
        super().__init__()
        self.n_head, self.activation, mlp_width = n_head, activation, mlp_width or 4 * width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x, seen=None):                                                   # (B, T, W)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(attention(q, k, v, self.n_head, seen))
        h = self.fc1(self.norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.activation == 'quick_gelu' else F.gelu(h)
        return x + self.fc2(h)


class Reader(nn.Module):
    """Lets some tokens read others: a layer of the Perceiver. Source: the form of Edge-Glass (one norm for both)."""

    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, read, watch=None):                                            # (B, T, W), (B, S, W)
        k, v = self.to_kv(self.norm1(read)).chunk(2, dim=-1)
        x = x + self.out(attention(self.to_q(self.norm1(x)), k, v, self.n_head, watch=watch))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))                           # (B, T, W)


def sinusoids_2d(side, width, extent=None):
    """Places on a side x side grid over `extent` patches, as sines and cosines of row and column -> (side * side, width)."""
    extent = extent or side
    freqs = 20 ** -(torch.arange(width // 4) / (width // 4))                           # wavelengths 6 to 120 patches
    axis = (torch.arange(side) + .5) * extent / side
    row, col = torch.meshgrid(axis, axis, indexing='ij')
    angles = [p.reshape(-1, 1) * freqs for p in (row, col)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1) * 2 ** .5


class ViT(nn.Module):
    """The trunk: patches, a class token or none, learned positions, a norm, blocks, no last norm. Source: CLIP (Radford 2021)."""

    def __init__(self, config):
        super().__init__()
        self.keep_class_token = config.keep_class_token
        W, side = config.width, config.image_px // config.patch_px
        if config.stem == 'conv':  # halves the picture until a patch is a pixel, then looks around once more
            widths = [W * 2 ** i // config.patch_px for i in range(1, config.patch_px.bit_length())]
            convs = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip([3] + widths, widths)]
            convs.append(nn.Conv2d(W, W, 3, padding=1))
            self.patches = nn.Sequential(*[m for conv in convs for m in (conv, nn.GELU())][:-1])
            self.patches.to(memory_format=torch.channels_last)  # faster, and a patch's channels come out side by side
        else:
            self.patches = nn.Conv2d(3, W, config.patch_px, config.patch_px, bias=False)
        self.class_token = nn.Parameter(torch.randn(W)) if config.class_token else None
        positions = sinusoids_2d(side, W)  # unit scale: positions drawn at .02 drown in the content
        if config.class_token:
            positions = torch.cat([torch.zeros(1, W), positions])
        self.positions = nn.Parameter(positions)
        self.norm = nn.LayerNorm(W)
        self.blocks = nn.ModuleList(Block(W, config.n_head, config.activation, config.mlp_width) for _ in range(config.n_layer))

    def forward(self, images):                                                         # (B, 3, S, S)
        x = self.patches(images).flatten(2).transpose(1, 2)                            # (B, P, W)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x if self.class_token is None or self.keep_class_token else x[:, 1:]    # (B, P, W)


class Perceiver(nn.Module):
    """The resampler: N learned latents read the patches, layer by layer. Source: Jaegle 2021; form of Edge-Glass:
    latents read the patches only, one norm serves both, and no positions are added."""

    def __init__(self, config):
        super().__init__()
        W = config.perceiver_width or config.width
        side = math.isqrt(config.n_latents)
        if side * side == config.n_latents:  # latents start spread over the picture, one looking at each part of it
            self.latents = nn.Parameter(sinusoids_2d(side, W, config.image_px // config.patch_px))
        else:
            self.latents = nn.Parameter(torch.randn(config.n_latents, W))
        self.layers = nn.ModuleList(Reader(W, config.perceiver_heads or config.n_head) for _ in range(config.perceiver_layers))
        self.norm = nn.LayerNorm(W)
        for layer in self.layers:  # like reads like: at the start a latent reads the patches around its own place
            nn.init.orthogonal_(layer.to_q.weight, gain=1.5)
            layer.to_kv.weight.data[:W] = layer.to_q.weight.data

    def forward(self, x, watch=None):                                                  # (B, P, W)
        latents = self.latents.expand(len(x), -1, -1)                                  # (B, N, W)
        for layer in self.layers:
            latents = layer(latents, x, watch)
        return self.norm(latents)                                                      # (B, N, W)


class Encoder(nn.Module):
    """Trunk, resampler and projection: pictures in, tokens out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        W, inner, D = config.width, config.perceiver_width or config.width, config.vision_dim
        self.trunk = ViT(config)
        self.adapter = {'none': nn.Identity, 'linear': lambda: nn.Linear(W, inner), 'mlp': lambda: nn.Sequential(
            nn.LayerNorm(W), nn.Linear(W, config.adapter_width), nn.GELU(), nn.Linear(config.adapter_width, inner))}[config.adapter]()
        self.resampler = Perceiver(config) if config.n_latents else nn.Identity()
        self.projection = {'none': nn.Identity, 'linear': lambda: nn.Linear(inner, D),
                           'norm_linear': lambda: nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, D))}[config.projection]()

    def forward(self, images):
        """Shapes: (B, 3, S, S), normalised as `preprocess` does, -> (B, N, D)."""
        return self.resample(self.patches(images))

    def patches(self, images):
        """The trunk's part, averaged pool x pool. Shapes: (B, 3, S, S) -> (B, P, W)."""
        x, side = self.trunk(images), self.config.image_px // self.config.patch_px
        if self.config.pool > 1:
            x = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (side, side)), self.config.pool).flatten(2).transpose(1, 2)
        return x                                                                       # (B, P, W)

    def resample(self, patches):
        """What follows the trunk. Shapes: (B, P, W) -> (B, N, D)."""
        return self.projection(self.resampler(self.adapter(patches)))

    def preprocess(self, picture):
        """A Pillow picture of any mode and size -> a normalised float tensor (3, S, S)."""
        return self.normalise(self.pixels(picture))

    def pixels(self, picture):
        """A Pillow picture of any size -> uint8 (3, S, S), made square as `fit` says; what is transparent becomes white. Of any mode but floats; of grey
        with more than 8 bits, 16 are read.
        Source: CLIPImageProcessorPil of transformers 5, which 'crop' equals bit by bit but for 'upright'. Raises: ValueError."""
        S, fit = self.config.image_px, self.config.fit
        if self.config.upright:
            try:
                picture = ImageOps.exif_transpose(picture)
            except (SyntaxError, ValueError, OSError, struct.error):  # damaged EXIF: the picture is taken as it lies
                pass
        if 'A' in picture.getbands() or 'transparency' in picture.info:
            picture = picture.convert('RGBA')
            picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
        if picture.mode.startswith(('I', 'F')):  # grey with more than 8 bits, which Pillow would cut off at 255
            low, high = picture.convert('F').getextrema()
            if picture.mode == 'F' or low < 0 or high > 65535:
                raise ValueError(f'a grey picture of mode {picture.mode} with values from {low:g} to {high:g}: expected 8 or 16 bits a pixel')
            picture = picture.convert('I').point(lambda level: level / 257 + .5).convert('L')
        picture = picture.convert('RGB')
        w, h = picture.size
        if fit == 'crop':  # the short side becomes S; then the middle of the long one
            w, h = (S, int(S * h / w)) if w <= h else (int(S * w / h), S)
        elif fit == 'pad':  # the long side becomes S
            w, h = (max(1, round(S * w / h)), S) if w <= h else (S, max(1, round(S * h / w)))
        else:
            w, h = S, S
        if w * h > 2 ** 26:
            raise ValueError(f'{picture.width} x {picture.height} pixels are too long and thin to be cropped to a square')
        picture = picture if picture.size == (w, h) else picture.resize((w, h), Image.BICUBIC)
        if fit == 'crop':
            left, top = (w - S) // 2, (h - S) // 2
            picture = picture.crop((left, top, left + S, top + S))
        elif fit == 'pad':
            square = Image.new('RGB', (S, S), tuple(round(255 * m) for m in self.config.mean))
            square.paste(picture, ((S - w) // 2, (S - h) // 2))
            picture = square
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def normalise(self, pixels):
        """Shapes: uint8 (..., 3, S, S), 0..255 -> float of the same shape, about zero mean and unit spread."""
        mean, std = (torch.tensor(t, device=pixels.device).view(3, 1, 1) for t in (self.config.mean, self.config.std))
        return (pixels.float() / 255 - mean) / std

    @torch.no_grad()
    def encode_images(self, images):
        """Shapes: (B, 3, S, S) -> (B, N, D), without gradient, `at_once` at a time."""
        return torch.cat([self(part) for part in images.split(self.at_once)])

    @property
    def at_once(self):
        """How many pictures to encode at a time, 64 at most: a layer's attention then takes no more than 0.25 GB."""
        return max(1, min(64, 2 ** 26 // (self.config.n_head * (self.config.image_px // self.config.patch_px) ** 4)))

    def fingerprint(self):
        """A short hash of the config and the weights: what its tokens depend on."""
        changed = {f.name: getattr(self.config, f.name) for f in fields(EncoderConfig) if getattr(self.config, f.name) != f.default}
        digest = hashlib.sha256(repr(sorted(changed.items())).encode())
        for key, t in sorted(self.state_dict().items()):
            digest.update(key.encode() + t.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------
# stage 1: alignment with captions

class AlignModel(nn.Module):
    """The encoder beside a small text tower, trained by two losses on captions of several phrases with words left out.

    Contrast: the mean image token and the mean word agree, at every Matryoshka prefix (symmetric InfoNCE, learned temperature).
    Cloze: the phrase reads the image tokens and fills in the words that were left out, which makes the tokens carry what
    contrast alone does not ask for, above all each object's place.
    Source: CLIP (Radford 2021), MRL (Kusupati 2022); the cloze is BERT's (Devlin 2019) with a picture to look at.
    """

    def __init__(self, encoder, vocab_size, width=128, n_layer=1, max_tokens=64):
        super().__init__()
        D, n_head = encoder.config.vision_dim, max(4, width // 64)
        if width % n_head:
            raise ValueError(f'text_width={width}: expected a multiple of {n_head}, the number of its heads')
        self.encoder = encoder
        self.embed = nn.Embedding(vocab_size + 1, width)  # the last one stands for a word left out
        self.positions = nn.Parameter(torch.randn(max_tokens, width))
        self.text = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.text_norm, self.text_projection = nn.LayerNorm(width), nn.Linear(width, D)
        self.vision_projection = nn.Linear(D, width)
        self.reader = Reader(width, n_head)
        self.cloze_norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, tokens, caption, left_out):
        """Shapes: tokens (B, N, D), the encoder's; caption (B, P, L), P phrases of up to L tokens, padded with -100; left_out (B, P, L)
        bool, words alone -> losses, a dict of scalars in nats."""
        idx = caption.masked_fill(left_out, self.embed.num_embeddings - 1)
        h, embedding = self.read_text(idx)                                             # (B, P * L, W), (B, D)
        losses = {'contrast': self.contrast(tokens.mean(1), embedding)}
        h = self.cloze_norm(self.reader(h, self.vision_projection(tokens)))            # (B, P * L, W)
        wanted = left_out.flatten(1)
        losses['cloze'] = F.cross_entropy(self.head(h[wanted]), caption.flatten(1)[wanted])
        return losses

    def read_text(self, caption):
        """Shapes: caption (B, P, L) -> states of the words (B, P * L, W), which see their own phrase, and embedding (B, D)."""
        B, P, L = caption.shape
        seen = (caption >= 0).view(B * P, L)
        h = self.embed(caption.clamp(min=0)).view(B * P, L, -1) + self.positions[:L]
        for block in self.text:
            h = block(h, seen)
        words = (self.text_norm(h) * seen[..., None]).view(B, P * L, -1).sum(1) / seen.view(B, -1).sum(1, keepdim=True)
        return h.reshape(B, P * L, -1), self.text_projection(words)

    def contrast(self, pooled, text):
        """Symmetric InfoNCE among the pairs of all processes, mean over the prefixes, in float32. Shapes: two (B, D) -> a scalar, ln B
        at chance."""
        with torch.autocast(pooled.device.type, enabled=False):
            pooled, text = gathered(pooled), gathered(text)
            scale, labels, loss = self.log_scale.exp().clamp(max=100), torch.arange(len(text), device=text.device), 0
            for d in self.encoder.config.prefixes:
                sims = scale * F.normalize(pooled[:, :d].float(), dim=1) @ F.normalize(text[:, :d].float(), dim=1).T
                loss = loss + (F.cross_entropy(sims, labels) + F.cross_entropy(sims.T, labels)) / 2
            return loss / len(self.encoder.config.prefixes)


class Gather(torch.autograd.Function):
    """The rows of all processes; a process gets back the gradients that all of them have for its rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gathered(x):
    """The rows of all processes that train together, as many in each; x itself where it is one process, or no training. Shapes: (B, D) -> (world * B, D)"""
    together = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled()
    return Gather.apply(x) if together else x


# ----------------------------------------------------------------------------
# files

FORMAT = 1  # of encoder files; raised when their content changes
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TRUNK_NAMES = {  # CLIP's tensors, as Hugging Face | as OpenAI and open_clip call them: here
    r'(embeddings\.)?class_embedding': 'class_token',
    r'embeddings\.position_embedding\.weight|positional_embedding': 'positions',
    r'embeddings\.patch_embedding|conv1': 'patches',
    r'pre_layrnorm|ln_pre': 'norm',
    r'encoder\.layers|transformer\.resblocks': 'blocks',
    r'(layer_norm|ln_)([12])': r'norm\2',
    r'self_attn\.([qkv])_proj': r'\1',
    r'attn\.in_proj_': 'qkv.',
    r'(self_)?attn\.out_proj': 'out',
    r'mlp\.(fc1|c_fc)': 'fc1',
    r'mlp\.(fc2|c_proj)': 'fc2'}
TRUNK_UNUSED = r'post_layernorm\..*|embeddings\.position_ids|ln_post\..*|proj'  # they make CLIP's embedding of the whole picture
OTHER_TOWER = (r'(visual|text)_projection\.weight|text_model\..*|text\..*|transformer\..*|token_embedding\.weight|positional_embedding|'
               r'ln_final\..*|text_projection|attn_mask|logit_scale|logit_bias|input_resolution|context_length|vocab_size')
EDGE_GLASS_UNUSED = r'attention_pool\..*'  # its embedding of the whole picture
EDGE_GLASS_PREFIXES = (512, 768, 1024, 1536, 2048, 3072, 4096)
EDGE_GLASS_NAMES = {  # what Edge-Glass has behind CLIP: here
    r'perceiver\.layers\.(\d+)\.(attn\.)?': r'resampler.layers.\1.',
    r'perceiver': 'resampler',
    r'to_out': 'out',
    r'ff\.net\.0': 'fc1',
    r'ff\.net\.3': 'fc2',
    r'final_projector': 'projection',
    r'projector\.net\.4': 'adapter.3',
    r'projector(\.net)?': 'adapter'}


EDGE_GLASS_CONFIG = EncoderConfig(  # CLIP ViT-L/14 at 336 pixels, 64 latents, 4096 dimensions
    image_px=336, patch_px=14, stem='patch', width=1024, n_layer=24, n_head=16, activation='quick_gelu', class_token=True, adapter='linear',
    n_latents=64, perceiver_layers=4, perceiver_heads=8, vision_dim=4096, prefixes=EDGE_GLASS_PREFIXES, mean=CLIP_MEAN, std=CLIP_STD)


def save_encoder(encoder, path):
    """Writes an encoder in half precision: config and weights, tensors and plain types only."""
    weights = {key: t.half().cpu() for key, t in encoder.state_dict().items()}
    write_whole(path, partial(torch.save, dict(format=FORMAT, kind='encoder', config=asdict(encoder.config), weights=weights)))


def load_encoder(path, **changes):
    """Reads an encoder: one that `save_encoder` wrote, or CLIP as Hugging Face (a folder, or its weights file), OpenAI or open_clip store
    it, or an aligned checkpoint of Edge-Glass. Which one it is, its content says. A relative path is also looked up beside this file.

    CLIP alone has no resampler: its tokens are the last hidden states of the patches. `changes` are settings of `EncoderConfig` that
    shall differ from what is read: activation, fit, upright, pool, n_head, perceiver_heads, image_px (the positions are interpolated).
    Raises: FileNotFoundError; ValueError for another kind of file and for missing or left-over weights, which it names.
    """
    found = next((p for p in (Path(path), Path(__file__).parent / path) if p.exists()), None)
    if found is None:
        raise FileNotFoundError(f'{path}: no such encoder file or folder; expected CLIP, a checkpoint of Edge-Glass, or what python train.py config/align.py makes')
    tensors, about = read_tensors(found)
    if about.get('kind') == 'encoder':
        if about.get('format') != FORMAT:
            raise ValueError(f'{path}: an encoder file of format {about.get("format")}, this code reads format {FORMAT}')
        config = about['config']
    else:
        about['keep_class_token'] = any(key.startswith('vision_encoder.attention_pool.') for key in tensors)  # two of Edge-Glass' versions
        tensors = renamed(path, tensors)
        try:
            config = config_of(path, tensors, about)
        except DAMAGED as e:
            raise ValueError(f'{path}: damaged ({e})') from None
    config |= {key: value for key, value in changes.items() if value is not None}
    with torch.device('meta'):
        expected = Encoder(EncoderConfig(**config)).state_dict().keys()
    if expected != tensors.keys():
        raise ValueError(f'{path}: weights are missing: {some(expected - tensors.keys()) or "none"}; left over: {some(tensors.keys() - expected) or "none"}')
    try:
        weights = {key: read(t).float() for key, t in tensors.items()}
    except (ValueError, *DAMAGED) as e:
        raise ValueError(f'{path}: damaged ({e})') from None
    encoder = Encoder(EncoderConfig(**config))
    weights['trunk.positions'] = fit_positions(weights['trunk.positions'], encoder.config)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f'{path}: its weights do not fit its config: {e}') from None
    return encoder.eval().requires_grad_(False)


def read(t):
    """A tensor, or what the function reads that stands for one."""
    return t() if callable(t) else t


def some(names, most=8):
    return ', '.join(sorted(names)[:most]) + f', ... ({len(names)} in all)' * (len(names) > most)


def renamed(path, tensors):
    """The tensors of CLIP, or of a checkpoint of Edge-Glass, under the names of an `Encoder`'s; what is not known keeps its name."""
    tensors = {key.removeprefix('module.'): t for key, t in tensors.items()}
    edge_glass = any(key.startswith('vision_encoder.') for key in tensors)
    if edge_glass:  # its other towers are left alone
        tensors = {key.removeprefix('vision_encoder.'): t for key, t in tensors.items() if key.startswith('vision_encoder.')}
    root = next((found[1] for key in tensors if (found := re.fullmatch(r'(|.*\.)(embeddings\.patch_embedding|conv1)\.weight', key))), None)
    if root is None:
        raise ValueError(f'{path}: not an encoder of this project, not CLIP, and not an aligned checkpoint of Edge-Glass: its tensors are '
                         f'{some(tensors) or "none"}')
    names = {}
    for key in tensors:
        in_trunk, name = key.startswith(root), key.removeprefix(root)
        unused = TRUNK_UNUSED if in_trunk else EDGE_GLASS_UNUSED if edge_glass else OTHER_TOWER
        if not re.fullmatch(unused, name):
            for theirs, ours in (TRUNK_NAMES if in_trunk else EDGE_GLASS_NAMES).items():
                name = re.sub(theirs, ours, name)
            if 'perceiver.latents' not in tensors:  # then Edge-Glass' one linear layer is the last one
                name = re.sub('^adapter', 'projection', name)
            names['trunk.' * in_trunk + name] = key
    weights = {name: tensors[key] for name, key in names.items()}
    for name in [name for name in weights if re.search(r'\.q\.(weight|bias)$', name)]:  # three matrices become one
        parts = [name.replace('.q.', f'.{p}.') for p in 'qkv']
        if all(part in weights for part in parts):
            weights[name.replace('.q.', '.qkv.')] = partial(lambda *three: torch.cat([read(t) for t in three]), *[weights.pop(part) for part in parts])
    return weights


def config_of(path, weights, about):
    """The config of an encoder (a dict), read off the shapes of its weights and, where these do not tell, from what is said beside them."""
    shape = lambda key: tuple(read(weights[key]).shape) if key in weights else ()
    count = lambda part: len({key.split('.')[2] for key in weights if key.startswith(part)})
    positions, patches, latents = shape('trunk.positions'), shape('trunk.patches.weight'), shape('resampler.latents')
    if len(positions) != 2 or len(patches) != 4 or math.isqrt(positions[0] - 1) ** 2 != positions[0] - 1:
        raise ValueError(f'{path}: positions of shape {positions}, patches of shape {patches}: expected those of a class token and a square of patches')
    width, n_layer = positions[1], about.get('n_layer') or count('trunk.blocks.')
    head_size = {1280: 80, 1408: 88, 1664: 104}.get(width, 64)                         # of open_clip's H, g and bigG; 64 elsewhere
    adapter, projection = (next((kind for key, kind in kinds.items() if f'{part}.{key}' in weights), 'none') for part, kinds in (
        ('adapter', {'weight': 'linear', '1.weight': 'mlp'}), ('projection', {'weight': 'linear', '1.weight': 'norm_linear'})))
    vision_dim = (shape('projection.weight') or shape('projection.1.weight') or (width,))[0]
    config = dict(
        stem='patch', class_token=True, keep_class_token=about['keep_class_token'], width=width, n_layer=n_layer, n_head=about.get('n_head') or max(1, width // head_size),
        patch_px=patches[3], image_px=math.isqrt(positions[0] - 1) * patches[3], mlp_width=(shape('trunk.blocks.0.fc1.weight') or (4 * width,))[0],
        activation=about.get('activation', 'quick_gelu'), mean=tuple(about.get('mean', CLIP_MEAN)), std=tuple(about.get('std', CLIP_STD)),
        n_latents=0, adapter=adapter, projection=projection, vision_dim=vision_dim, prefixes=(vision_dim,), fit='crop')
    if adapter == 'mlp':
        config |= dict(adapter_width=shape('adapter.1.weight')[0])
    if projection != 'none':  # Edge-Glass'
        config |= dict(fit='squash', prefixes=tuple(d for d in EDGE_GLASS_PREFIXES if d < vision_dim) + (vision_dim,))
    if latents:
        config |= dict(n_latents=latents[0], perceiver_width=latents[1], perceiver_heads=8, perceiver_layers=count('resampler.layers.'))
    if not about.get('n_head'):
        resampler = f', {latents[0]} latents that read in {config["perceiver_layers"]} layers of 8 heads' if latents else ''
        print(f'{path}: {n_layer} layers of {config["n_head"]} heads{resampler}, activation {config["activation"]}: the file does not tell heads and '
              f'activation, these were assumed')
    return config


def fit_positions(positions, config):
    """Learned positions for another number of patches, interpolated. Shapes: (1 or 0 + P, W) -> (1 or 0 + P', W)."""
    first, grid = positions[:config.class_token], positions[config.class_token:]
    old, new = math.isqrt(len(grid)), config.image_px // config.patch_px
    if old == new:
        return positions
    print(f'encoder: pictures of {config.image_px} pixels, its positions interpolated from {old} x {old} to {new} x {new} patches')
    grid = F.interpolate(grid.T.view(1, -1, old, old), (new, new), mode='bicubic', antialias=new < old)
    return torch.cat([first, grid.view(-1, new * new).T])


def read_tensors(path):
    """Opens the weights of a file or a folder without reading them all -> {name: tensor, or function that reads it}, and what is said
    beside them: of this project's own file kind, format, config; of the others n_head, n_layer, activation, mean, std, as far as known."""
    names = [f'{stem}.{ext}' for ext in ('safetensors', 'bin') for stem in ('model', 'pytorch_model', 'open_clip_model', 'open_clip_pytorch_model')]
    folder = path if path.is_dir() else path.parent if path.name in names else None
    described = lambda name: read_json(folder / name) if folder and (folder / name).is_file() else {}
    files = [path]
    if path.is_dir():
        for name in names:
            if (folder / f'{name}.index.json').is_file():
                files = [folder / Path(part).name for part in sorted(set(described(f'{name}.index.json')['weight_map'].values()))]
                break
            if (folder / name).is_file():
                files = [folder / name]
                break
        else:
            raise ValueError(f'{path}: a folder without weights: expected one of {", ".join(names)}, or {names[0]}.index.json')
    tensors, about = {}, {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such file; {path} names it as a part of its weights')
        part, said = read_safetensors(file) if file.suffix == '.safetensors' else read_torch_file(file)
        tensors, about = tensors | part, about | said
    if about.get('kind') == 'encoder':
        return tensors, about

    if any(key.endswith('visual.conv1.weight') for key in tensors):
        return tensors, describe_open_clip(described('open_clip_config.json'), openai=about.get('torchscript', False))
    return tensors, describe_hugging_face(path, described('config.json'), described('preprocessor_config.json'))


def describe_open_clip(config, openai):
    if not config:
        return dict(activation='quick_gelu' if openai else 'gelu')
    model, pictures = config.get('model_cfg', {}), config.get('preprocess_cfg', {})
    vision, about = model.get('vision_cfg', {}), dict(activation='quick_gelu' if model.get('quick_gelu') else 'gelu')
    if 'width' in vision:
        about['n_head'] = vision['width'] // vision.get('head_width', 64)
    if isinstance(vision.get('layers'), int):
        about['n_layer'] = vision['layers']
    return about | {key: pictures[key] for key in ('mean', 'std') if key in pictures}


def describe_hugging_face(path, config, pictures):
    if not config:
        return {}
    vision = config.get('vision_config') or config  # files of old list only what differs from the defaults
    eps, activation = vision.get('layer_norm_eps', 1e-5), vision.get('hidden_act', 'quick_gelu')
    if eps != 1e-5 or activation not in ('gelu', 'quick_gelu'):
        raise ValueError(f'{path}: config.json says layer_norm_eps {eps}, hidden_act {activation}: expected 1e-5, and gelu or quick_gelu')
    about = dict(activation=activation, n_head=vision.get('num_attention_heads', 12), n_layer=vision.get('num_hidden_layers', 12))
    return about | {key: pictures[f'image_{key}'] for key in ('mean', 'std') if f'image_{key}' in pictures}


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f'{path}: not JSON: {e}') from None


def read_safetensors(path):
    """-> ({name: function that reads the tensor}, {}). Needs the package safetensors."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f'{path}: to read it, pip install safetensors') from None
    try:
        file = safe_open(path, framework='pt')
    except SafetensorError as e:
        raise ValueError(f'{path}: not a safetensors file ({e})') from None
    return {key: partial(file.get_tensor, key) for key in file.keys()}, {}


DAMAGED = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, AssertionError, OSError, zipfile.BadZipFile, zlib.error,
           pickle.UnpicklingError)  # what reading a bad archive raises, beside ValueError


def read_torch_file(path):
    """-> ({name: tensor, or a function that reads it}, about) of a file of torch.save or, read without running any of it, of a TorchScript archive.
    `about` is a dict: of this project's own files what stands beside the weights, of an archive that it is one."""
    try:
        if zipfile.is_zipfile(path) and any(name.endswith('/constants.pkl') for name in zipfile.ZipFile(path).namelist()):
            return read_torchscript(path), {'torchscript': True}
    except (ValueError, *DAMAGED) as e:
        raise ValueError(f'{path}: not a file that can be read safely ({e})') from None
    saved = safe_load(path)
    if isinstance(saved, dict) and saved.get('kind') == 'encoder':
        return saved.pop('weights', {}), saved
    for level in ('model_state_dict', 'state_dict'):
        saved = saved.get(level, saved) if isinstance(saved, dict) else {}
    return {key: t for key, t in saved.items() if torch.is_tensor(t)}, {}


def safe_load(path):
    """torch.load of tensors and plain types only: nothing in the file is run. The settings that Edge-Glass pickled into its checkpoints,
    classes of its module `config`, become empty objects. Files up to 1 GB are held against their checksums, larger ones
    are memory-mapped. Raises: ValueError for everything else."""
    try:
        zipped, large = zipfile.is_zipfile(path), os.path.getsize(path) >= 2 ** 30
        if zipped and not large:
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise ValueError(f'damaged: {part} has another checksum than when it was written')
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        inert = [(type('Settings', (), {}), name) for name in foreign if re.fullmatch(r'config\.\w+Config', name)]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped and large)
    except (ValueError, *DAMAGED) as e:
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        telling = next((line.strip() for line in lines if 'GLOBAL' in line), lines[0])
        raise ValueError(f'{path}: not a file that can be read safely ({telling[:200]})') from None


DTYPES = {'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16, 'FloatStorage': torch.float32, 'DoubleStorage': torch.float64,
          'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8,
          'BoolStorage': torch.bool}


def read_torchscript(path):
    """The tensors of a TorchScript archive, OpenAI's form -> {name: function that reads the tensor}. Its code is not touched, and the
    classes of its pickle become empty objects; anything but these and tensors is refused. Raises: ValueError, DAMAGED."""
    archive = zipfile.ZipFile(path)
    root = archive.namelist()[0].split('/')[0]

    def tensor(storage, offset, size, stride, *_):
        dtype, name = storage
        return lambda: torch.frombuffer(bytearray(archive.read(f'{root}/data/{name}')), dtype=dtype).as_strided(size, stride, offset)

    class TensorReader(pickle.Unpickler):
        def find_class(self, module, name):
            if module.split('.')[0] == '__torch__':
                return type(name, (), {})
            if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
                return tensor
            if (module, name) == ('collections', 'OrderedDict'):
                return dict
            if module == 'torch' and name.endswith('Storage'):
                return DTYPES[name]
            if module == 'torch.jit._pickle':  # wraps plain lists
                return lambda value, *_: value
            raise pickle.UnpicklingError(f'it wants {module}.{name}')

        def persistent_load(self, storage):
            return storage[1:3]  # dtype and number

    tensors = {}

    def collect(module, prefix):
        for key, value in vars(module).items():
            if callable(value) and not isinstance(value, type):
                tensors[prefix + key] = value
            elif hasattr(value, '__dict__') and not isinstance(value, type):
                collect(value, f'{prefix}{key}.')

    collect(TensorReader(archive.open(f'{root}/data.pkl')).load(), '')
    return tensors


# ----------------------------------------------------------------------------
# pictures as files -> pixels -> tokens. `pictures` is a sequence of files as bytes that also has `digests`, their sha256, and `names`, what
# to call them in messages: data.Pictures, say.

FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')  # no others: to decode EPS Pillow starts a program that runs what is in it
UNREADABLE = OSError, SyntaxError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, MemoryError, struct.error, zlib.error


def open_picture(data, most_pixels=2 ** 26):
    """Decodes a picture file completely. Raises: ValueError where it is no picture, is cut off, moves, or is gigantic: its kind, a colon, the details."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > most_pixels:
            raise ValueError(f'more than {most_pixels} pixels: {picture.width} x {picture.height}')
        if getattr(picture, 'is_animated', False) and picture.format != 'MPO':  # MPO: a photograph with a preview
            raise ValueError(f'animated: {picture.n_frames} frames')
        picture.load()
        return picture
    except Image.DecompressionBombError as e:
        raise ValueError(f'more than {most_pixels} pixels: {e}') from None
    except UnidentifiedImageError:
        raise ValueError('not a picture: of no known format') from None
    except UNREADABLE as e:  # what Pillow raises for a bad file
        raise ValueError(f'not a picture that can be decoded: {e or type(e).__name__}') from None


def picture_from(file, encoder):
    """A picture file, ready for an encoder. Shapes: -> (3, S, S). Raises: FileNotFoundError, ValueError naming the file."""
    try:
        return encoder.preprocess(open_picture(Path(file).read_bytes()))
    except ValueError as e:
        raise ValueError(f'{file}: {e}') from None


def decode(encoder, data, digest):
    """The pixels of a picture file, uint8 (3, S, S), or a string that says why there are none, as `data` may be too."""
    if isinstance(data, str):
        return data
    if hashlib.sha256(data).digest() != digest:
        return 'it has changed since it was read first'
    try:
        return encoder.pixels(open_picture(data))
    except ValueError as e:
        return str(e)


def decode_all(encoder, pictures, wanted, n, batch_size):
    """Decodes with all cores, a batch ahead: yields [(index, pixels, or None where there are none), ...] for the n pictures with wanted(index).
    Raises: ValueError at the end, counting and naming those that cannot be decoded."""
    if not n:
        return
    bad, ahead = [], []

    def finished(batch):
        results = [(i, future.result()) for i, future in batch]
        bad.extend(f'{pictures.names[i]}: {pixels}' for i, pixels in results if isinstance(pixels, str))
        return [(i, None if isinstance(pixels, str) else pixels) for i, pixels in results]

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for i, data in enumerate(pictures):
            if wanted(i):
                ahead.append((i, pool.submit(decode, encoder, data, pictures.digests[i])))
                if len(ahead) == 2 * batch_size:
                    yield finished(ahead[:batch_size])
                    del ahead[:batch_size]
        for start in range(0, len(ahead), batch_size):
            yield finished(ahead[start:start + batch_size])
    if bad:
        raise ValueError(f'{len(bad)} of {len(pictures)} pictures cannot be used: {"; ".join(bad[:3])}'
                         f'{"; ..." * (len(bad) > 3)}: remove or repair them')


def pixel_array(encoder, pictures):
    """All pictures decoded, in memory. Shapes: -> (n, 3, S, S) uint8."""
    batches = decode_all(encoder, pictures, lambda i: True, len(pictures), 256)
    return torch.stack([pixels for batch in batches for _, pixels in batch])


class PixelReader:
    """Pictures decoded when they are asked for, on all cores. Shapes: [indices (B,)] -> (B, 3, S, S) uint8"""

    def __init__(self, encoder, pictures):
        self.encoder, self.pictures, self.pool = encoder, pictures, ThreadPoolExecutor()

    def __getitem__(self, indices):
        pixels = list(self.pool.map(partial(decode, self.encoder), *zip(*[(self.pictures[i], self.pictures.digests[i]) for i in indices.tolist()])))
        for i, p in zip(indices.tolist(), pixels):
            if isinstance(p, str):
                raise ValueError(f'{self.pictures.names[i]}: {p}: remove or repair it')
        return torch.stack(pixels)


class Features:
    """The tokens of pictures, read from the parts of a cache as they are asked for. Shapes: [indices (B,)] -> (B, N, D) float16"""

    def __init__(self, files, per_part, n):
        self.files, self.per_part, self.n = files, per_part, n

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        indices, tokens = indices.numpy(), None
        parts = indices // self.per_part
        for p in np.unique(parts):
            part = np.load(self.files[p], mmap_mode='r')  # anew every time: what stays mapped counts as this process's memory
            tokens = np.empty((len(indices), *part.shape[1:]), np.float16) if tokens is None else tokens
            tokens[parts == p] = part[indices[parts == p] % self.per_part]
        return torch.from_numpy(tokens)


def cached_features(encoder, pictures, cache_dir, device='cpu', dim=None, part_bytes=2 ** 28):
    """The tokens of all pictures, encoded once and kept in `cache_dir`, in parts of `part_bytes`. A part is named after what it is made
    from: encoder, dim, dtype and the content of its pictures; so it is never stale, every run shares it, and a run that is killed
    goes on behind the last whole part.

    Shapes: dim, how many dimensions of a token to keep, None: all -> (n, N, dim) float16
    Raises: ValueError naming the pictures that cannot be decoded, and where the disk is too small.
    """
    dim = dim or encoder.config.vision_dim
    dtype = fast_dtypes(device)[-1] if device.startswith('cuda') else torch.float32  # of the matrix products
    with torch.no_grad():
        shape = encoder(torch.zeros(1, 3, encoder.config.image_px, encoder.config.image_px, device=device)).shape[1:-1] + (dim,)
    per_part, maker = max(1, part_bytes // (2 * math.prod(shape))), f'{encoder.fingerprint()} {dim} {dtype}'.encode()
    starts = range(0, len(pictures), per_part)
    files = [Path(cache_dir) / f'{hashlib.sha256(maker + b"".join(pictures.digests[i:i + per_part])).hexdigest()[:32]}.npy' for i in starts]
    sizes = [min(per_part, len(pictures) - i) for i in starts]
    whole = lambda p: is_whole(files[p], (sizes[p], *shape))
    if not all(map(whole, range(len(files)))):
        with locked(Path(cache_dir) / '.lock', wait=True):  # what another process writes meanwhile is found there afterwards
            missing = [p for p in range(len(files)) if not whole(p)]
            if missing:
                encode_parts(encoder, pictures, {p: Part(files[p], (sizes[p], *shape)) for p in missing}, per_part, cache_dir, device, dim, dtype)
    return Features(files, per_part, len(pictures))


def encode_parts(encoder, pictures, parts, per_part, cache_dir, device, dim, dtype):
    """Encodes the pictures of some parts of a cache, {number of the part: Part}, and writes them. Raises: as `cached_features`."""
    n, done, start = sum(map(len, parts.values())), 0, time.time()
    for leftover in Path(cache_dir).glob('.*.npy.partial'):  # of a process that was killed: nobody else writes here now
        leftover.unlink()
    need, free = sum(2 * math.prod(part.shape) for part in parts.values()), shutil.disk_usage(cache_dir).free
    print(f'encoding {n} pictures into {cache_dir}: {need / 1e9:.2f} GB, {free / 1e9:.0f} GB are free')
    if need > free:
        raise ValueError(f'cache_dir={cache_dir}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: choose another '
                         f'--cache_dir, a smaller --vision_dim, or --cache=false to encode in every step')
    try:
        for batch in decode_all(encoder, pictures, lambda i: i // per_part in parts, n, encoder.at_once):
            for i, pixels in batch:
                if pixels is None:
                    parts[i // per_part].drop()
            batch = [(i, pixels) for i, pixels in batch if not parts[i // per_part].dropped]
            if batch:
                with torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32):
                    tokens = encoder.encode_images(encoder.normalise(torch.stack([pixels for _, pixels in batch]).to(device)))[..., :dim].half().cpu().numpy()
                for (i, _), t in zip(batch, tokens):
                    parts[i // per_part].write(t)
            done += len(batch)
            progress('encoding pictures', done, n, start)
    finally:
        for part in parts.values():
            part.drop()
    print(f'| took {time.time() - start:.0f} s')


class Part:
    """A part of a cache, written picture by picture; it is in place when it is whole, or not at all. Shapes: of the part (n, N, D)"""

    def __init__(self, file, shape):
        self.file, self.shape, self.written, self.out, self.dropped = file, shape, 0, None, False
        self.unfinished = file.with_name(f'.{file.name}.partial')

    def write(self, tokens):
        if self.out is None:
            self.out = open(self.unfinished, 'wb')
            np.lib.format.write_array_header_1_0(self.out, dict(descr='<f2', fortran_order=False, shape=self.shape))
        self.out.write(tokens.tobytes())
        self.written += 1
        if self.written == len(self):
            self.out.flush()
            os.fsync(self.out.fileno())
            self.out.close()
            os.replace(self.unfinished, self.file)

    def __len__(self):
        return self.shape[0]

    def drop(self):
        """Gives up what is not whole."""
        self.dropped = True
        if self.out is not None:
            self.out.close()
            self.unfinished.unlink(missing_ok=True)


def is_whole(file, shape):
    """Whether a part of a cache is there and has its size; one that has not is encoded anew."""
    try:
        part = np.load(file, mmap_mode='r') if file.is_file() else None
        return part is not None and part.shape == shape and part.dtype == np.float16
    except (ValueError, OSError, EOFError):
        print(f'{file}: damaged, it is made again')
        return False


def bench(encoder, n, device):
    """Prints how many pictures per second are decoded and encoded, and the most memory that took: n photographs of noise, 1024 x 768."""
    rng, files = np.random.default_rng(0), []
    for _ in range(n):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((1024, 768), Image.BICUBIC).save(buffer, 'JPEG', quality=90)
        files.append(buffer.getvalue())
    with ThreadPoolExecutor() as pool:
        took = seconds(lambda: list(pool.map(lambda data: encoder.pixels(open_picture(data)), files)), device)
    print(f'decoding, all cores: {n / took:.1f} pictures/s')
    pixels = encoder.pixels(open_picture(files[0]))
    for dtype in (torch.float32, torch.bfloat16):
        images = encoder.normalise(torch.stack([pixels] * min(n, 32)).to(device))
        with torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32):
            encoder.encode_images(images[:1])
            took = min(seconds(lambda: encoder.encode_images(images), device) for _ in range(2))
        print(f'encoding, {str(dtype)[6:]}: {len(images) / took:.2f} pictures/s, {len(images)} at once')
    print(f'at most {most_memory(device) / 1e9:.1f} GB of memory; a picture takes {2e-6 * encoder.encode_images(images[:1]).numel():.2f} MB of the cache')


def main(argv):
    """Encodes pictures and shows what comes out."""
    parser = argparse.ArgumentParser(description='Encode pictures with a frozen encoder and show the shapes and the time.')
    parser.add_argument('pictures', nargs='*', help='picture files')
    parser.add_argument('--encoder', help='encoder file or folder: this project\'s, CLIP, or a checkpoint of Edge-Glass (default: assets/encoder_shapes.pt; '
                                          'with --bench random weights of Edge-Glass\' shapes: CLIP ViT-L/14 at 336 pixels, 64 latents, 4096 dimensions)')
    parser.add_argument('--bench', type=int, metavar='N', help='time the decoding and encoding of N drawn photographs instead')
    parser.add_argument('--device', default='auto', help='auto (a GPU if there is one), cpu, cuda, ... (default: %(default)s)')
    args = parser.parse_args(argv)
    if not args.pictures and not args.bench:
        parser.error('which pictures? FILE ..., or --bench=N')
    device = pick_device(args.device)
    if args.bench and not args.encoder:
        encoder = Encoder(EDGE_GLASS_CONFIG).eval().requires_grad_(False)
        print(f'random weights | {sum(p.numel() for p in encoder.parameters()):,} parameters')
    else:
        path = args.encoder or 'assets/encoder_shapes.pt'
        encoder = load_encoder(path)
        print(f'{path} | {sum(p.numel() for p in encoder.parameters()):,} parameters | fingerprint {encoder.fingerprint()}')
    encoder.to(device)
    if args.bench:
        bench(encoder, args.bench, device)
    for file in args.pictures:
        images = picture_from(file, encoder)[None].to(device)
        start = time.time()
        tokens = encoder.encode_images(images).cpu()
        print(f'{file} | {tuple(images.shape)} -> {tuple(tokens.shape)} | {1e3 * (time.time() - start):.1f} ms')


if __name__ == '__main__':
    run_script(main)
