"""
CLIP, as Hugging Face, OpenAI, open_clip and Edge-Glass store it: its tensors under our names, and its config.

`read_clip` is the way in. The config is read off the shapes of the weights and off the files beside them;
what neither tells is assumed, and that is printed.
"""

import math
import re
from functools import partial

import torch

from plumbing.files import DAMAGED
from pretrained.files import as_tensor, first_few, read_beside

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TRUNK_NAMES = {  # CLIP's tensors, as Hugging Face | as OpenAI and open_clip call them: our names
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
    r'mlp\.(fc2|c_proj)': 'fc2',
}

# they make CLIP's embedding of the whole picture
TRUNK_UNUSED = r'post_layernorm\..*|embeddings\.position_ids|ln_post\..*|proj'

OTHER_TOWER = (
    r'(visual|text)_projection\.weight|text_model\..*|text\..*|transformer\..*|token_embedding\.weight|'
    r'positional_embedding|ln_final\..*|text_projection|attn_mask|logit_scale|logit_bias|input_resolution|'
    r'context_length|vocab_size'
)

EDGE_GLASS_UNUSED = r'attention_pool\..*'  # its embedding of the whole picture

EDGE_GLASS_PREFIXES = (512, 768, 1024, 1536, 2048, 3072, 4096)

EDGE_GLASS_NAMES = {  # what Edge-Glass has after CLIP: our names
    r'perceiver\.layers\.(\d+)\.(attn\.)?': r'resampler.layers.\1.',
    r'perceiver': 'resampler',
    r'to_out': 'out',
    r'ff\.net\.0': 'fc1',
    r'ff\.net\.3': 'fc2',
    r'final_projector': 'projection',
    r'projector\.net\.4': 'adapter.3',
    r'projector(\.net)?': 'adapter',
}


def read_clip(path, tensors, about, title):
    """The config of an encoder (a dict), and its weights under the names of `encoder.Encoder`'s.

    `path`, `tensors` and `about` as `open_weights` takes and gives them; `title` is what messages call the
    file. Tensors that are not known keep their names.
    Raises: ValueError.
    """
    # open_clip and OpenAI call the picture's tower `visual`
    if any(key.endswith('visual.conv1.weight') for key in tensors):
        openai = about.get('torchscript', False)
        known = describe_open_clip(read_beside(path, 'open_clip_config.json'), openai)
    else:
        config = read_beside(path, 'config.json')
        # transformers 5 writes the first one alone, and reads it first
        preprocessing = read_beside(path, 'processor_config.json').get('image_processor')
        preprocessing = preprocessing or read_beside(path, 'preprocessor_config.json')
        known = describe_hugging_face(path, config, preprocessing)
    # two of Edge-Glass' versions pool it in
    keep_class_token = any(key.startswith('vision_encoder.attention_pool.') for key in tensors)
    weights = renamed(title, tensors)
    try:
        config = config_of(title, weights, known)
    except DAMAGED as e:
        raise ValueError(f'{title}: damaged ({e})') from None
    config['keep_class_token'] = keep_class_token
    return config, weights


# ----------------------------------------------------------------------------
# what stands beside the weights: n_head, n_layer, activation, mean, std, as far as known

def describe_open_clip(config, openai):
    """-> dict. config: of open_clip_config.json, {} without one; openai: whether it is OpenAI's own file."""
    if openai:
        return dict(activation='quick_gelu', mean=CLIP_MEAN, std=CLIP_STD)
    if not config:
        # most of open_clip's models were trained with GELU
        return dict(activation='gelu')
    model = config.get('model_cfg', {})
    vision = model.get('vision_cfg', {})
    known = dict(activation='quick_gelu' if model.get('quick_gelu') else 'gelu')
    if 'width' in vision:
        known['n_head'] = vision['width'] // vision.get('head_width', 64)
    if isinstance(vision.get('layers'), int):  # a list: a ResNet's
        known['n_layer'] = vision['layers']
    preprocessing = config.get('preprocess_cfg', {})
    for key in ('mean', 'std'):
        if key in preprocessing:
            known[key] = preprocessing[key]
    return known


def describe_hugging_face(path, config, preprocessing):
    """-> dict. Of config.json and preprocessor_config.json, {} without them. Raises: ValueError."""
    known = {key: preprocessing[f'image_{key}'] for key in ('mean', 'std') if f'image_{key}' in preprocessing}
    if not preprocessing.get('do_normalize', True):
        known = dict(mean=(0., 0., 0.), std=(1., 1., 1.))
    if not config:
        return known
    vision = config.get('vision_config') or config  # files of old list only what differs from the defaults
    eps = vision.get('layer_norm_eps', 1e-5)
    activation = vision.get('hidden_act', 'quick_gelu')
    if eps != 1e-5 or activation not in ('gelu', 'quick_gelu'):
        raise ValueError(f'{path}: config.json says layer_norm_eps {eps}, hidden_act {activation}: expected '
                         '1e-5, and gelu or quick_gelu')
    return known | dict(activation=activation, n_head=vision.get('num_attention_heads', 12),
                        n_layer=vision.get('num_hidden_layers', 12))


# ----------------------------------------------------------------------------
# names

def renamed(title, tensors):
    """The tensors of CLIP, or of a checkpoint of Edge-Glass, under our names. Raises: ValueError."""
    tensors = {key.removeprefix('module.'): t for key, t in tensors.items()}
    edge_glass = any(key.startswith('vision_encoder.') for key in tensors)
    if edge_glass:  # its other towers are left alone
        tensors = {key.removeprefix('vision_encoder.'): t for key, t in tensors.items()
                   if key.startswith('vision_encoder.')}
    root = trunk_root(tensors)
    if root is None:
        raise ValueError(f'{title}: not an encoder of this project, not CLIP, and not an aligned checkpoint '
                         f'of Edge-Glass: its tensors are {first_few(tensors) or "none"}')
    has_perceiver = 'perceiver.latents' in tensors
    unused_beside = EDGE_GLASS_UNUSED if edge_glass else OTHER_TOWER
    weights = {}
    for key, t in tensors.items():
        name = key.removeprefix(root)
        in_trunk = key.startswith(root)
        if re.fullmatch(TRUNK_UNUSED if in_trunk else unused_beside, name):
            continue
        name = substituted(name, TRUNK_NAMES if in_trunk else EDGE_GLASS_NAMES)
        if not has_perceiver:  # then Edge-Glass' one linear layer is the last one
            name = re.sub('^adapter', 'projection', name)
        if in_trunk:
            name = 'trunk.' + name
        weights[name] = t
    return with_joined_qkv(weights)


def trunk_root(tensors):
    """What the names of CLIP's picture tower begin with, '' where they stand alone; None: it is not CLIP."""
    for key in tensors:
        found = re.fullmatch(r'(|.*\.)(embeddings\.patch_embedding|conv1)\.weight', key)
        if found:
            return found[1]
    return None


def substituted(name, table):
    """A name after all substitutions of a table, {pattern: replacement}, in its order."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def with_joined_qkv(weights):
    """Hugging Face's three matrices q, k and v as the one of ours; those that are not whole stay."""
    weights = dict(weights)
    for name in list(weights):
        if not re.search(r'\.q\.(weight|bias)$', name):
            continue
        parts = [name.replace('.q.', f'.{letter}.') for letter in 'qkv']
        if all(part in weights for part in parts):
            three = [weights.pop(part) for part in parts]
            weights[name.replace('.q.', '.qkv.')] = partial(joined, three)
    return weights


def joined(tensors):
    """Shapes: three of (W, ...) -> (3 W, ...)."""
    return torch.cat([as_tensor(t) for t in tensors])


# ----------------------------------------------------------------------------
# config

def config_of(title, weights, known):
    """The config of an encoder (a dict), read off the shapes of its weights and, where these do not tell,
    from what is known beside them. Raises: ValueError, DAMAGED."""
    positions = shape_of(weights, 'trunk.positions')
    patches = shape_of(weights, 'trunk.patches.weight')
    if len(positions) != 2 or len(patches) != 4 or math.isqrt(positions[0] - 1) ** 2 != positions[0] - 1:
        raise ValueError(f'{title}: positions of shape {positions}, patches of shape {patches}: expected '
                         'those of a class token and a square of patches')
    width = positions[1]
    mlp = shape_of(weights, 'trunk.blocks.0.fc1.weight')
    # the widths of open_clip's H, g and bigG; 64 elsewhere
    head_size = {1280: 80, 1408: 88, 1664: 104}.get(width, 64)
    config = dict(
        stem='patch',
        class_token=True,
        width=width,
        n_layer=known.get('n_layer') or count_layers(weights, 'trunk.blocks.'),
        n_head=known.get('n_head') or max(1, width // head_size),
        patch_px=patches[3],
        image_px=math.isqrt(positions[0] - 1) * patches[3],
        mlp_width=mlp[0] if mlp else 4 * width,
        activation=known.get('activation', 'quick_gelu'),
        mean=tuple(known.get('mean', CLIP_MEAN)),
        std=tuple(known.get('std', CLIP_STD)),
    )
    config |= after_the_trunk(weights, width)
    if not known.get('n_head'):
        print_assumed(title, config)
    if not {'mean', 'std'} <= known.keys():
        print(f'{title}: nothing beside the weights tells how pixels are normalised, assumed are mean '
              f'{config["mean"]} and std {config["std"]}')
    return config


def after_the_trunk(weights, width):
    """The part of the config that is about adapter, resampler and projection: CLIP has none of them,
    Edge-Glass has some."""
    adapter = form_of(weights, 'adapter', deeper='mlp')
    projection = form_of(weights, 'projection', deeper='norm_linear')
    matrix = shape_of(weights, 'projection.weight') or shape_of(weights, 'projection.1.weight')
    vision_dim = matrix[0] if matrix else width
    config = dict(n_latents=0, adapter=adapter, projection=projection, vision_dim=vision_dim,
                  prefixes=(vision_dim,), fit='crop')
    if adapter == 'mlp':
        config['adapter_width'] = shape_of(weights, 'adapter.1.weight')[0]
    if projection != 'none':  # then it is Edge-Glass'
        smaller = tuple(d for d in EDGE_GLASS_PREFIXES if d < vision_dim)
        config['prefixes'] = (*smaller, vision_dim)
        config['fit'] = 'squash'
    latents = shape_of(weights, 'resampler.latents')
    if latents:
        config['n_latents'] = latents[0]
        config['perceiver_width'] = latents[1]
        config['perceiver_heads'] = 8  # no file says it
        config['perceiver_layers'] = count_layers(weights, 'resampler.layers.')
    return config


def shape_of(weights, name):
    """Of one of the weights, () where it is not there."""
    if name not in weights:
        return ()
    return tuple(as_tensor(weights[name]).shape)


def count_layers(weights, part):
    """How many numbers follow `part`, two names with a dot after each, in the names of the weights."""
    return len({name.split('.')[2] for name in weights if name.startswith(part)})


def form_of(weights, part, deeper):
    """'none', 'linear', or `deeper` where the part has several layers, of which the first is a norm."""
    if f'{part}.weight' in weights:
        return 'linear'
    if f'{part}.1.weight' in weights:
        return deeper
    return 'none'


def print_assumed(title, config):
    """Shapes do not tell heads, nor the activation: a wrong guess would give wrong tokens without a word."""
    resampler = ''
    if config['n_latents']:
        resampler = (f', {config["n_latents"]} latents that read in {config["perceiver_layers"]} layers of '
                     '8 heads')
    print(f'{title}: {config["n_layer"]} layers of {config["n_head"]} heads{resampler}, activation '
          f'{config["activation"]}: the file does not tell heads and activation, these were assumed')
