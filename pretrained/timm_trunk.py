"""
Any image network of timm as the trunk of an encoder: its patch tokens, or the cells of its last feature map.

`read_timm` is the way in. timm builds the network and knows what its pictures should be like; the weights are
a local file, or come from the hub. timm is optional: pip install timm
"""

import difflib
import math
import re
from pathlib import Path

import torch
import torch.nn as nn

from plumbing.files import DAMAGED
from pretrained.files import as_tensor, first_few, open_weights
from pretrained.hub import folder_of

PREFIX = 'timm/'  # a name that starts so always means timm, also where a folder is called so


class TimmTrunk(nn.Module):
    """A network of timm, without what it pools and classifies with."""

    def __init__(self, name, image_px):
        super().__init__()
        # channels side by side: on a CPU a convolutional network is then nearly twice as fast
        self.net = without_head(create(name, image_px)).to(memory_format=torch.channels_last)

    def forward(self, images):
        """Shapes: (B, 3, S, S) -> (B, P, W)."""
        return patch_tokens(self.net, images.contiguous(memory_format=torch.channels_last))

    def train(self, mode=True):
        """Trained along, its dropout stays off, and its batch norms keep the statistics that they came with:
        those of a few pictures would be noise, and a picture's tokens depend on that picture alone."""
        return super().train(False)


def patch_tokens(net, images):
    """Shapes: (B, 3, S, S) -> (B, P, W), row by row. Raises: ValueError."""
    x = net.forward_features(images)  # (B, prefix + P, W), (B, W, h, w) or (B, h, w, W)
    if not torch.is_tensor(x) or x.dim() not in (3, 4):
        raise ValueError(f'{net.default_cfg["architecture"]}: its features are no tokens and no map of cells')
    if x.dim() == 4:
        if getattr(net, 'output_fmt', 'NCHW') == 'NHWC':
            return x.flatten(1, 2)                                     # (B, P, W)
        return x.flatten(2).transpose(1, 2)                            # (B, P, W)
    # class token and registers come first
    return x[:, getattr(net, 'num_prefix_tokens', 0):]                 # (B, P, W)


def read_timm(name, image_px=None):
    """The config of an encoder (a dict), its weights under the names of `encoder.Encoder`'s, and its name
    with the revision on the hub, or None.

    name: 'timm/NAME', whose weights come from the hub, or 'timm/NAME@COMMIT' of it, or 'timm/NAME@FILE';
    image_px: another side than that the network was trained with.
    Raises: ValueError, FileNotFoundError.
    """
    title = str(name)
    name, _, file = title.partition('@')
    about = known_config(name)
    px = image_px or about['input_size'][1]
    path, source = weights_of(name, file, about)
    tensors = open_weights(path)[0]
    net = without_head(load(name, px, tensors, title))
    try:
        with torch.no_grad():
            tokens = patch_tokens(net, torch.zeros(1, 3, px, px))      # (1, P, W)
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f'{title}: it takes no pictures of {px} pixels: {e}') from None
    side = math.isqrt(tokens.size(1))
    if side ** 2 != tokens.size(1) or side < 2:
        raise ValueError(f'{title}: its features are {tokens.size(1)} tokens a picture: expected a square of '
                         'patches or cells')
    width = tokens.size(2)
    fits = dict(center='crop', squash='squash', border='pad')
    config = dict(
        trunk=name,
        image_px=px,
        patch_px=-(-px // side),
        width=width,
        n_head=math.gcd(width, 4096) // 64 or 1,  # of a resampler that follows, unless told otherwise
        n_latents=0,
        projection='none',
        vision_dim=width,
        prefixes=(width,),
        mean=tuple(about['mean']),
        std=tuple(about['std']),
        fit=fits[about.get('crop_mode') or 'center'],
        crop_pct=about.get('crop_pct') or .875,
        interpolation=about.get('interpolation') or 'bicubic',
    )
    return config, {f'trunk.net.{key}': t for key, t in net.state_dict().items()}, source


def weights_of(name, file, about):
    """The file of weights, or its folder, on this machine, and where on the hub it is from.
    Raises: ValueError, FileNotFoundError."""
    if file and Path(file).exists():
        return Path(file), None
    if not about.get('hf_hub_id'):
        raise ValueError(f'{name}: timm knows no weights of this name on the hub; --encoder={name}@FILE '
                         'takes a file')
    if file and not re.fullmatch('[0-9a-f]{40}', file):
        raise FileNotFoundError(f'{name}@{file}: no such file of weights')
    folder, source = folder_of('@'.join(filter(None, (about['hf_hub_id'], file))))
    return folder, f"{name}@{source.partition('@')[2]}"


# ----------------------------------------------------------------------------
# timm

def import_timm():
    """Raises: ValueError with a hint."""
    try:
        import timm
    except (ImportError, RuntimeError) as e:  # the latter where torchvision is another build than torch
        raise ValueError(f'timm/ names a network of the package timm, which cannot be imported ({e}): '
                         'pip install timm') from None
    return timm


def known_config(name):
    """What timm knows of a network, a dict: sides and colours of its pictures, where its weights are.
    Raises: ValueError."""
    timm = import_timm()
    model = name.removeprefix(PREFIX)
    architecture = model.partition('.')[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        near = ', '.join(near) or 'timm.list_models() has them all'
        raise ValueError(f'{name}: timm has no such network; near it: {near}')
    try:
        about = timm.get_pretrained_cfg(model)
    except RuntimeError:
        about = None
    if about is None:
        tags = ', '.join(timm.list_pretrained(architecture + '.*')) or 'no others'
        raise ValueError(f'{name}: timm knows no such weights; it knows {tags}')
    return about.to_dict()


def create(name, image_px, title=None, **more):
    """A network as timm builds it. `title`: what messages call it. Raises: ValueError."""
    timm = import_timm()
    sized = {}
    if known_config(name).get('fixed_input_size'):  # a transformer's: the others take pictures of any size
        sized = dict(img_size=image_px)
    try:
        return timm.create_model(name.removeprefix(PREFIX), num_classes=0, **sized, **more).eval()
    except (AssertionError, RuntimeError, TypeError) as e:
        raise ValueError(f'{title or name}: timm cannot build it for pictures of {image_px} pixels'
                         f'{" with these weights" if more else ""}: {e}') from None


def load(name, image_px, tensors, title):
    """A network with the weights of a file. timm gives them the names they have today, and fits positions to
    the number of patches. Raises: ValueError where weights are missing or left over."""
    heads = known_config(name).get('classifier') or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    try:
        weights = {key: as_tensor(t) for key, t in tensors.items()}
    except (ValueError, *DAMAGED) as e:
        raise ValueError(f'{title}: damaged ({e})') from None
    weights = {key.removeprefix('module.'): t for key, t in weights.items()}
    # other classes than ImageNet's may stand there: nothing is classified here
    left_out = tuple(f'{head}.' for head in heads)
    weights = {key: t for key, t in weights.items() if not key.startswith(left_out)}
    if not weights:
        raise ValueError(f'{title}: no weights in it: {first_few(tensors) or "nothing"}')
    given = dict(state_dict=weights, num_classes=0)  # so nothing is fetched
    return create(name, image_px, title, pretrained=True, pretrained_cfg_overlay=given)


def without_head(net):
    """What pools and classifies is left out, where a network can do without: no token comes from it."""
    try:
        net.reset_classifier(0, '')
    except (AssertionError, NotImplementedError, RuntimeError, TypeError):
        pass
    return net
