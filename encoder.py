"""
The frozen vision encoder: a picture becomes a few tokens that language can be read from.

    pictures (B, 3, S, S) -> ViT trunk -> (B, P, W) -> Perceiver resampler -> (B, N, W) -> projection -> (B, N, D)

The trunk has CLIP's form, the resampler turns its P patches into N tokens, and the projection is Matryoshka: every listed
prefix of the D dimensions is trained to be an embedding of its own, so a decoder may read only the first `vision_dim` of them.
`AlignModel` trains the encoder against captions (stage 1); from then on it is frozen, encodes each picture once, and
`cached_features` keeps the result on disk (stage 2).

    python encoder.py FILE...    # encode pictures, print shapes and timing
"""

import argparse
import hashlib
import io
import math
import os
import pickle
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image


@dataclass
class EncoderConfig:
    image_px: int = 64                      # side of the square picture, in pixels
    patch_px: int = 8                       # side of a patch, in pixels
    stem: str = 'conv'                      # 'conv': strided 3x3 convolutions; 'patch': one patch_px convolution (CLIP)
    width: int = 128                        # W, width of the trunk and the resampler
    n_layer: int = 2                        # layers of the trunk
    n_head: int = 4                         # attention heads, everywhere
    activation: str = 'gelu'                # 'gelu' or 'quick_gelu' (OpenAI's CLIP)
    class_token: bool = False               # CLIP's; dropped before the resampler
    n_latents: int = 16                     # N, tokens of a picture; 0: no resampler, the patches are the tokens
    perceiver_layers: int = 2               # layers of the resampler
    vision_dim: int = 128                   # D, dimensions of a token
    prefixes: tuple = (16, 32, 64, 128)     # Matryoshka: each of these prefixes of D is an embedding
    mean: tuple = (0.5, 0.5, 0.5)           # of a channel, pixels 0..1
    std: tuple = (0.25, 0.25, 0.25)         # of a channel, pixels 0..1


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

    def __init__(self, width, n_head, activation='gelu'):
        super().__init__()
        self.n_head, self.activation = n_head, activation
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, seen=None):                                                   # (B, T, W)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(attention(q, k, v, self.n_head, seen))
        h = self.fc1(self.norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.activation == 'quick_gelu' else F.gelu(h)
        return x + self.fc2(h)


class Reader(nn.Module):
    """Lets some tokens read others: a layer of the Perceiver. Source: the form of the Edge-Glass seed (one norm for both)."""

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
        self.blocks = nn.ModuleList(Block(W, config.n_head, config.activation) for _ in range(config.n_layer))

    def forward(self, images):                                                         # (B, 3, S, S)
        x = self.patches(images).flatten(2).transpose(1, 2)                            # (B, P, W)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x if self.class_token is None else x[:, 1:]                             # (B, P, W)


class Perceiver(nn.Module):
    """The resampler: N learned latents read the patches, layer by layer. Source: Jaegle 2021; form of the Edge-Glass seed:
    latents read the patches only, one norm serves both, and no positions are added."""

    def __init__(self, config):
        super().__init__()
        W = config.width
        side = math.isqrt(config.n_latents)
        if side * side == config.n_latents:  # latents start spread over the picture, one looking at each part of it
            self.latents = nn.Parameter(sinusoids_2d(side, W, config.image_px // config.patch_px))
        else:
            self.latents = nn.Parameter(torch.randn(config.n_latents, W))
        self.layers = nn.ModuleList(Reader(W, config.n_head) for _ in range(config.perceiver_layers))
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
        self.trunk = ViT(config)
        self.resampler = Perceiver(config) if config.n_latents else nn.Identity()
        self.projection = nn.Linear(config.width, config.vision_dim)

    def forward(self, images):
        """Shapes: (B, 3, S, S), normalised as `preprocess` does, -> (B, N, D)."""
        return self.projection(self.resampler(self.trunk(images)))

    def preprocess(self, picture):
        """A Pillow picture of any mode and size -> a normalised float tensor (3, S, S)."""
        return self.normalise(self.pixels(picture))

    def pixels(self, picture):
        """A Pillow picture of any mode and size -> uint8 (3, S, S), squashed to a square."""
        picture, size = picture.convert('RGB'), (self.config.image_px,) * 2
        picture = picture if picture.size == size else picture.resize(size, Image.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def normalise(self, pixels):
        """Shapes: uint8 (..., 3, S, S), 0..255 -> float of the same shape, about zero mean and unit spread."""
        mean, std = (torch.tensor(t, device=pixels.device).view(3, 1, 1) for t in (self.config.mean, self.config.std))
        return (pixels.float() / 255 - mean) / std

    @torch.no_grad()
    def encode_images(self, images):
        """Shapes: (B, 3, S, S) -> (B, N, D), without gradient."""
        return self(images)

    def fingerprint(self):
        """A short hash of the config and the weights: what its tokens depend on."""
        digest = hashlib.sha256(repr(asdict(self.config)).encode())
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
        D, n_head = encoder.config.vision_dim, encoder.config.n_head
        self.encoder = encoder
        self.embed = nn.Embedding(vocab_size + 1, width)  # the last one stands for a word left out
        self.positions = nn.Parameter(torch.randn(max_tokens, width))
        self.text = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.text_norm, self.text_projection = nn.LayerNorm(width), nn.Linear(width, D)
        self.vision_projection = nn.Linear(D, width)
        self.reader = Reader(width, n_head)
        self.cloze_norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, images, caption, left_out):
        """Shapes: images (B, 3, S, S); caption (B, P, L), P phrases of up to L tokens, padded with -100; left_out (B, P, L) bool
        -> losses, a dict of scalars in nats."""
        tokens = self.encoder(images)                                                  # (B, N, D)
        idx = caption.masked_fill(left_out, self.embed.num_embeddings - 1)
        h, embedding = self.read_text(idx)                                             # (B, P * L, W), (B, D)
        losses = {'contrast': self.contrast(tokens.mean(1), embedding)}
        h = self.cloze_norm(self.reader(h, self.vision_projection(tokens)))            # (B, P * L, W)
        wanted = (left_out & (caption >= 0)).flatten(1)
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
        """Symmetric InfoNCE, mean over the prefixes, in float32. Shapes: two (B, D) -> a scalar, ln B at chance."""
        with torch.autocast(pooled.device.type, enabled=False):
            scale, labels, loss = self.log_scale.exp().clamp(max=100), torch.arange(len(text), device=text.device), 0
            for d in self.encoder.config.prefixes:
                sims = scale * F.normalize(pooled[:, :d].float(), dim=1) @ F.normalize(text[:, :d].float(), dim=1).T
                loss = loss + (F.cross_entropy(sims, labels) + F.cross_entropy(sims.T, labels)) / 2
            return loss / len(self.encoder.config.prefixes)


# ----------------------------------------------------------------------------
# files

FORMAT = 1  # of encoder files; raised when their content changes


def save_encoder(encoder, path):
    """Writes an encoder in half precision: config and weights, tensors and plain types only."""
    weights = {key: t.half().cpu() for key, t in encoder.state_dict().items()}
    partial = f'{path}.partial'
    torch.save(dict(format=FORMAT, kind='encoder', config=asdict(encoder.config), weights=weights), partial)
    os.replace(partial, path)


def load_encoder(path):
    """Reads an encoder that `save_encoder` wrote; a relative path is also looked up beside this file.

    Raises: FileNotFoundError; ValueError for another kind of file and for missing or left-over weights, which it names.
    """
    found = next((p for p in (Path(path), Path(__file__).parent / path) if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(f'{path}: no such encoder file; python train.py config/align.py makes one')
    try:
        saved = torch.load(found, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as e:
        raise ValueError(f'{path}: not an encoder file that can be read safely ({str(e).splitlines()[0][:200]})') from None
    if not isinstance(saved, dict) or saved.get('kind') != 'encoder' or saved.get('format') != FORMAT:
        raise ValueError(f'{path}: not an encoder file of format {FORMAT}')
    encoder = Encoder(EncoderConfig(**saved['config']))
    try:
        encoder.load_state_dict({key: t.float() for key, t in saved['weights'].items()})
    except RuntimeError as e:
        raise ValueError(f'{path}: its weights do not fit its config: {e}') from None
    return encoder.eval().requires_grad_(False)


# ----------------------------------------------------------------------------
# encode once, keep on disk

def open_picture(data, most_pixels=2 ** 26):
    """Decodes a picture file completely. Raises: ValueError where it is no picture, is cut off, or is gigantic."""
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > most_pixels:
            raise ValueError(f'{picture.width} x {picture.height} pixels are more than {most_pixels}')
        picture.load()
        return picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:  # what Pillow raises for a bad file
        raise ValueError(f'not a picture that can be decoded ({e})') from None


def decode_all(encoder, pictures, names):
    """Yields the pixels of every picture file, uint8 (3, S, S). Raises: ValueError at the end, counting and naming those that fail."""
    bad = []
    for data, name in zip(pictures, names):
        try:
            yield encoder.pixels(open_picture(data))
        except ValueError as e:
            bad.append(f'{name}: {e}')
    if bad:
        raise ValueError(f'{len(bad)} of {len(pictures)} pictures cannot be used: {"; ".join(bad[:3])}'
                         f'{"; ..." * (len(bad) > 3)}: remove or repair them')


def pixel_array(encoder, pictures, names):
    """All pictures decoded, in memory, for training the encoder along. Shapes: -> (n, 3, S, S) uint8."""
    return torch.stack(list(decode_all(encoder, pictures, names)))


def cached_features(encoder, pictures, names, cache_dir, device='cpu', batch_size=256):
    """The tokens of all pictures, encoded once and kept in `cache_dir` under a name made of what they were made from.

    Shapes: pictures, a list of n picture files as bytes; names, what to call them in messages
        -> (n, N, D) float16, memory-mapped
    Raises: ValueError naming the pictures that cannot be decoded.
    """
    key = hashlib.sha256(encoder.fingerprint().encode())
    for data in pictures:
        key.update(hashlib.sha256(data).digest())
    path = Path(cache_dir) / f'{key.hexdigest()[:32]}.npy'
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
        start, done, batch, features = time.time(), 0, [], None
        try:
            for pixels in decode_all(encoder, pictures, names):
                batch.append(pixels)
                if len(batch) == batch_size or done + len(batch) == len(pictures):
                    tokens = encoder.encode_images(encoder.normalise(torch.stack(batch).to(device))).half().cpu().numpy()
                    if features is None:
                        features = np.lib.format.open_memmap(partial, 'w+', np.float16, (len(pictures), *tokens.shape[1:]))
                    features[done:done + len(batch)] = tokens
                    done, batch = done + len(batch), []
                    eta = (time.time() - start) / done * (len(pictures) - done)
                    print(f'\rencoding pictures | {done}/{len(pictures)} | eta {eta:.0f} s ', end='', flush=True)
            print(f'| took {time.time() - start:.0f} s')
            features.flush()
            os.replace(partial, path)  # whole or not at all
        finally:
            partial.unlink(missing_ok=True)
    return np.load(path, mmap_mode='r')


def main(argv=None):
    """Encodes pictures and shows what comes out."""
    parser = argparse.ArgumentParser(description='Encode pictures with a frozen encoder and show the shapes and the time.')
    parser.add_argument('pictures', nargs='+', help='picture files')
    parser.add_argument('--encoder', default='assets/encoder_shapes.pt', help='encoder file (default: %(default)s)')
    args = parser.parse_args(argv)
    encoder = load_encoder(args.encoder)
    parameters = sum(p.numel() for p in encoder.parameters())
    print(f'{args.encoder} | {parameters:,} parameters | fingerprint {encoder.fingerprint()}')
    for file in args.pictures:
        images = encoder.preprocess(open_picture(Path(file).read_bytes()))[None]
        start = time.time()
        tokens = encoder.encode_images(images)
        print(f'{file} | {tuple(images.shape)} -> {tuple(tokens.shape)} | {1e3 * (time.time() - start):.1f} ms')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f'error: {e}')
