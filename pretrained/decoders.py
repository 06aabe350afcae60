"""
Pretrained language models, as Hugging Face stores them: Llama 3, SmolLM2, Qwen2, Qwen2.5 and Qwen3.

`read_decoder` is the way in: it gives the settings of `model.ModelConfig` that one needs, and its tensors,
named as in `model.Decoder`.
"""

import math
import re
from pathlib import Path

import torch

from plumbing.files import DAMAGED
from pretrained.files import as_tensor, first_few, open_weights, read_beside
from pretrained.hub import folder_of, is_hub_name

FAMILIES = ('llama', 'qwen2', 'qwen3')  # model_type of config.json

SIZES = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
         'num_key_value_heads', 'head_dim')
LLAMA3 = ('original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor', 'factor')
TOKENIZERS = ('tokenizer.json', 'vocab.json')
MAY_LACK = ('num_key_value_heads', 'head_dim')

NAMES = {  # Hugging Face's names: ours, in this order
    r'model\.embed_tokens': 'embed',
    r'model\.layers': 'blocks',
    r'input_layernorm': 'norm1',
    r'post_attention_layernorm': 'norm2',
    r'self_attn\.o_proj': 'attention.out',
    r'self_attn\.': 'attention.',
    r'mlp\.down_proj': 'fc2',
    r'mlp\.': '',
    r'model\.norm': 'head.0',
    r'lm_head': 'head.1',
}

MERGED = {  # our tensor: theirs, joined in this order
    'attention.qkv.weight': [f'attention.{part}_proj.weight' for part in 'qkv'],
    'attention.qkv.bias': [f'attention.{part}_proj.bias' for part in 'qkv'],
    'fc1.weight': ['gate_proj.weight', 'up_proj.weight'],
}


def read_decoder(name):
    """The settings of a decoder and its marks, two dicts, and its weights in float32, named as in
    `model.Decoder`.

    name: a folder, or a name on the hub. Raises: ValueError, FileNotFoundError.
    """
    folder = found_folder(name)
    about = read_beside(folder, 'config.json')
    if not isinstance(about, dict) or not about:
        raise ValueError(f'{name}: no config.json in it: expected a language model as Hugging Face stores it')
    tensors, _ = open_weights(folder)
    tied = is_tied(about, tensors)
    try:
        settings = settings_of(about, f'{folder}/config.json') | dict(tied_head=tied)
        weights = renamed(tensors, settings, name)
    except KeyError as e:
        raise ValueError(f'{name}: {e.args[0]} is missing') from None
    return settings, marks_of(about), weights


def marks_of(about):
    """The ids that pad, begin and end an answer, a dict. Without a token for padding that is the end's."""
    eos = about.get('eos_token_id')
    eos = eos[0] if isinstance(eos, list) else eos
    pad = about.get('pad_token_id')
    marks = dict(pad_id=eos if pad is None else pad, bos_id=about.get('bos_token_id'), eos_id=eos)
    return {key: id for key, id in marks.items() if id is not None}


def found_folder(name):
    """The folder of a language model: a local one, or what the hub's name stands for. Raises: ValueError,
    FileNotFoundError."""
    folder = Path(name)
    if is_hub_name(str(name)):
        folder = folder_of(str(name), TOKENIZERS)[0]
    if not folder.is_dir():
        raise FileNotFoundError(f'{name}: no such folder: expected one with config.json and weights')
    return folder


def settings_of(about, file):
    """The settings of ModelConfig that a config.json asks for. Raises: ValueError, KeyError."""
    family = about.get('model_type')
    if family not in FAMILIES:
        raise ValueError(f'{file}: model_type {family!r}: expected one of {", ".join(FAMILIES)}')
    for key, wanted in dict(hidden_act='silu', mlp_bias=False, use_sliding_window=False).items():
        if about.get(key, wanted) != wanted:
            raise ValueError(f'{file}: {key} {about[key]!r}: expected {wanted!r}')
    if family != 'qwen2' and about.get('attention_bias'):
        raise ValueError(f'{file}: attention_bias: only Qwen2 may have it')
    n_head = about['num_attention_heads']
    for key in SIZES:
        size = about.get(key, n_head) if key in MAY_LACK else about[key]
        if size is None and key in MAY_LACK:
            continue
        if type(size) is not int or not 0 < size < 2 ** 24:
            raise ValueError(f'{file}: {key} {size!r}: expected a whole number')
    norm_eps = about.get('rms_norm_eps', 1e-6)
    if type(norm_eps) not in (int, float) or norm_eps < 0:
        raise ValueError(f'{file}: rms_norm_eps {norm_eps!r}: expected 0 or more')
    head_size = about.get('head_dim') or about['hidden_size'] // n_head
    return dict(
        norm='rms',
        prefix_lm=False,
        vocab_size=about['vocab_size'],
        n_layer=about['num_hidden_layers'],
        n_head=n_head,
        n_kv_head=about.get('num_key_value_heads') or n_head,
        n_embd=about['hidden_size'],
        head_size=head_size,
        mlp_size=about['intermediate_size'],
        qkv_bias=family == 'qwen2',
        qk_norm=family == 'qwen3',
        norm_eps=norm_eps,
        rope_freqs=rope_freqs(about, head_size, file),
    )


def rope_freqs(about, head_size, file):
    """The angle of one position for each pair of a head, as a tuple. Raises: ValueError.

    Source of 'llama3', which stretches what turns slowly for longer texts: Grattafiori 2024, arXiv
    2407.21783, as Hugging Face's transformers computes it.
    """
    rope = about.get('rope_parameters') or about.get('rope_scaling') or {}
    if not isinstance(rope, dict):
        raise ValueError(f'{file}: rope_parameters {rope!r}: expected an object')
    base = rope.get('rope_theta') or about.get('rope_theta') or 10000.0
    numbers = [base, *(rope.get(key, 1) for key in LLAMA3)]
    if not all(type(number) in (int, float) and number > 0 for number in numbers):
        raise ValueError(f'{file}: rope_theta {base!r}, {rope}: expected numbers above 0')
    kind = rope.get('rope_type', rope.get('type', 'default'))
    freqs = base ** -(torch.arange(0, head_size, 2) / head_size)       # (hs / 2,)
    if kind == 'llama3':
        length, low, high, factor = (rope[key] for key in LLAMA3)
        turns = length * freqs / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of the angle that stays as it was
        freqs = freqs * (kept + (1 - kept) / factor)
    elif kind != 'default':
        raise ValueError(f'{file}: rope_type {kind!r}: expected default or llama3')
    return tuple(freqs.tolist())


def is_tied(about, tensors):
    """Whether the head is the embedding: config.json may not say; a tied head may be stored too."""
    tied = about.get('tie_word_embeddings')
    return 'lm_head.weight' not in tensors if tied is None else bool(tied)


def renamed(tensors, settings, title):
    """The weights under our names, in float32; what stands side by side is one.
    Raises: ValueError, KeyError."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            name = re.sub(rf'(^|(?<=\.)){theirs}', ours, name)
        found[name] = tensor
    weights = {}

    def take(name):
        tensor = found.pop(name)
        try:
            return as_tensor(tensor).float()
        except (ValueError, *DAMAGED) as e:
            raise ValueError(f'{title}: damaged ({e})') from None

    weights['embed.weight'] = take('embed.weight')
    for i in range(settings['n_layer']):
        for ours in ('norm1.weight', 'norm2.weight', 'attention.out.weight', 'fc2.weight'):
            weights[f'blocks.{i}.{ours}'] = take(f'blocks.{i}.{ours}')
        for ours, theirs in MERGED.items():
            if ours.endswith('bias') and not settings['qkv_bias']:
                continue
            weights[f'blocks.{i}.{ours}'] = torch.cat([take(f'blocks.{i}.{part}') for part in theirs])
        if settings['qk_norm']:
            heads = [take(f'blocks.{i}.attention.q_norm.weight').expand(settings['n_head'], 1, -1),
                     take(f'blocks.{i}.attention.k_norm.weight').expand(settings['n_kv_head'], 1, -1)]
            weights[f'blocks.{i}.attention.qk_scale'] = torch.cat(heads)   # (nh + kv, 1, hs)
    weights['head.0.weight'] = take('head.0.weight')
    if settings['tied_head']:
        found.pop('head.1.weight', None)
        weights['head.1.weight'] = weights['embed.weight']
    else:
        weights['head.1.weight'] = take('head.1.weight')
    rows = tuple(weights['embed.weight'].shape)
    if rows != (settings['vocab_size'], settings['n_embd']):  # before a model of other sizes is built
        raise ValueError(f'{title}: config.json says vocab_size {settings["vocab_size"]}, hidden_size '
                         f'{settings["n_embd"]}, the weights have {rows}')
    left = [name for name in found if not name.endswith('rotary_emb.inv_freq')]
    if left:
        raise ValueError(f'{title}: weights that no decoder of these families has: {first_few(left)}')
    return weights
