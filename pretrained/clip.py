"""CLIP, as Hugging Face, OpenAI, open_clip and Edge-Glass store it: its tensors under our names, and its
config."""

import math
import re
from functools import partial
from pathlib import Path

import torch

from pretrained.files import as_tensor, first_few, read_json, read_safetensors, read_torch_file

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
    r'mlp\.(fc2|c_proj)': 'fc2',
}

# they make CLIP's embedding of the whole picture
TRUNK_UNUSED = r'post_layernorm\..*|embeddings\.position_ids|ln_post\..*|proj'

OTHER_TOWER = (
    r'(visual|text)_projection\.weight|text_model\..*|text\..*|transformer\..*|token_embedding\.weight|'
    r'positional_embedding|'
    r'ln_final\..*|text_projection|attn_mask|logit_scale|logit_bias|input_resolution|context_length|'
    r'vocab_size'
)

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
    r'projector(\.net)?': 'adapter',
}


def renamed(path, tensors):
    """The tensors of CLIP, or of a checkpoint of Edge-Glass, under the names of an `Encoder`'s; what is not
    known keeps its name."""
    tensors = {key.removeprefix('module.'): t for key, t in tensors.items()}
    edge_glass = any(key.startswith('vision_encoder.') for key in tensors)
    if edge_glass:  # its other towers are left alone
        tensors = {
            key.removeprefix('vision_encoder.'): t
            for key, t in tensors.items()
            if key.startswith('vision_encoder.')
        }
    root = next(
        (
            found[1]
            for key in tensors
            if (found := re.fullmatch(r'(|.*\.)(embeddings\.patch_embedding|conv1)\.weight', key))
        ),
        None,
    )
    if root is None:
        raise ValueError(
            f'{path}: not an encoder of this project, not CLIP, and not an aligned checkpoint of Edge-Glass: '
            f'its tensors are '
            f'{first_few(tensors) or "none"}'
        )
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
    for name in [
        name for name in weights if re.search(r'\.q\.(weight|bias)$', name)
    ]:  # three matrices become one
        parts = [name.replace('.q.', f'.{p}.') for p in 'qkv']
        if all(part in weights for part in parts):
            three = [weights.pop(part) for part in parts]
            weights[name.replace('.q.', '.qkv.')] = partial(joined, three)
    return weights


def joined(tensors):
    return torch.cat([as_tensor(t) for t in tensors])


def config_of(path, weights, about):
    """The config of an encoder (a dict), read off the shapes of its weights and, where these do not tell,
    from what is said beside them."""

    def shape(key):
        return tuple(as_tensor(weights[key]).shape) if key in weights else ()

    def count(part):
        return len({key.split('.')[2] for key in weights if key.startswith(part)})

    positions = shape('trunk.positions')
    patches = shape('trunk.patches.weight')
    latents = shape('resampler.latents')
    if len(positions) != 2 or len(patches) != 4 or math.isqrt(positions[0] - 1) ** 2 != positions[0] - 1:
        raise ValueError(
            f'{path}: positions of shape {positions}, patches of shape {patches}: expected those of a class '
            f'token and a square of patches'
        )
    width, n_layer = positions[1], about.get('n_layer') or count('trunk.blocks.')
    head_size = {1280: 80, 1408: 88, 1664: 104}.get(width, 64)  # of open_clip's H, g and bigG; 64 elsewhere
    adapter, projection = (
        next((kind for key, kind in kinds.items() if f'{part}.{key}' in weights), 'none')
        for part, kinds in (
            ('adapter', {'weight': 'linear', '1.weight': 'mlp'}),
            ('projection', {'weight': 'linear', '1.weight': 'norm_linear'}),
        )
    )
    vision_dim = (shape('projection.weight') or shape('projection.1.weight') or (width,))[0]
    config = dict(
        stem='patch',
        class_token=True,
        keep_class_token=about['keep_class_token'],
        width=width,
        n_layer=n_layer,
        n_head=about.get('n_head') or max(1, width // head_size),
        patch_px=patches[3],
        image_px=math.isqrt(positions[0] - 1) * patches[3],
        mlp_width=(shape('trunk.blocks.0.fc1.weight') or (4 * width,))[0],
        activation=about.get('activation', 'quick_gelu'),
        mean=tuple(about.get('mean', CLIP_MEAN)),
        std=tuple(about.get('std', CLIP_STD)),
        n_latents=0,
        adapter=adapter,
        projection=projection,
        vision_dim=vision_dim,
        prefixes=(vision_dim,),
        fit='crop',
    )
    if adapter == 'mlp':
        config |= dict(adapter_width=shape('adapter.1.weight')[0])
    if projection != 'none':  # Edge-Glass'
        config |= dict(
            fit='squash', prefixes=tuple(d for d in EDGE_GLASS_PREFIXES if d < vision_dim) + (vision_dim,)
        )
    if latents:
        config |= dict(
            n_latents=latents[0],
            perceiver_width=latents[1],
            perceiver_heads=8,
            perceiver_layers=count('resampler.layers.'),
        )
    if not about.get('n_head'):
        resampler = (
            f', {latents[0]} latents that read in {config["perceiver_layers"]} layers of 8 heads'
            if latents
            else ''
        )
        print(
            f'{path}: {n_layer} layers of {config["n_head"]} heads{resampler}, activation '
            f'{config["activation"]}: the file does not tell heads and '
            f'activation, these were assumed'
        )
    return config


def describe_open_clip(config, openai):
    if not config:
        return dict(activation='quick_gelu' if openai else 'gelu')
    model, pictures = config.get('model_cfg', {}), config.get('preprocess_cfg', {})
    vision, about = (
        model.get('vision_cfg', {}),
        dict(activation='quick_gelu' if model.get('quick_gelu') else 'gelu'),
    )
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
        raise ValueError(
            f'{path}: config.json says layer_norm_eps {eps}, hidden_act {activation}: expected 1e-5, and '
            f'gelu or quick_gelu'
        )
    about = dict(
        activation=activation,
        n_head=vision.get('num_attention_heads', 12),
        n_layer=vision.get('num_hidden_layers', 12),
    )
    return about | {key: pictures[f'image_{key}'] for key in ('mean', 'std') if f'image_{key}' in pictures}


def read_tensors(path):
    """Opens the weights of a file or a folder without reading them all -> {name: tensor, or function that
    reads it}, and what is said beside them: of this project's own file kind, format, config; of the others
    n_head, n_layer, activation, mean, std, as far as known."""
    names = [
        f'{stem}.{ext}'
        for ext in ('safetensors', 'bin')
        for stem in ('model', 'pytorch_model', 'open_clip_model', 'open_clip_pytorch_model')
    ]
    folder = path if path.is_dir() else path.parent if path.name in names else None

    def described(name):
        return read_json(folder / name) if folder and (folder / name).is_file() else {}

    files = [path]
    if path.is_dir():
        for name in names:
            if (folder / f'{name}.index.json').is_file():
                files = [
                    folder / Path(part).name
                    for part in sorted(set(described(f'{name}.index.json')['weight_map'].values()))
                ]
                break
            if (folder / name).is_file():
                files = [folder / name]
                break
        else:
            raise ValueError(
                f'{path}: a folder without weights: expected one of {", ".join(names)}, or '
                f'{names[0]}.index.json'
            )
    tensors, about = {}, {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such file; {path} names it as a part of its weights')
        part, said = read_safetensors(file) if file.suffix == '.safetensors' else read_torch_file(file)
        tensors, about = tensors | part, about | said
    if about.get('kind') == 'encoder':
        return tensors, about

    if any(key.endswith('visual.conv1.weight') for key in tensors):
        return tensors, describe_open_clip(
            described('open_clip_config.json'), openai=about.get('torchscript', False)
        )
    return tensors, describe_hugging_face(
        path, described('config.json'), described('preprocessor_config.json')
    )
