"""
Files of weights that others wrote: safetensors, torch, TorchScript; in one piece or several.

Nothing in them is run. A tensor that is large is not read when its file is opened: in its place stands a
function that reads it.
"""

import json
import pickle
import zipfile
from functools import partial
from pathlib import Path

import torch

from plumbing.files import DAMAGED, refuse_impostor, safe_load

# what Hugging Face and open_clip call a file of weights in a folder, in the order that is looked for
STEMS = ('model', 'pytorch_model', 'open_clip_model', 'open_clip_pytorch_model')
WEIGHT_NAMES = [f'{stem}.{ext}' for ext in ('safetensors', 'bin') for stem in STEMS]


def as_tensor(t):
    """A tensor, or what the function reads that stands for one."""
    if callable(t):
        return t()
    return t


def first_few(names, most=8):
    """Names for a message: the first of them in order, and how many there are if that is more."""
    listed = ', '.join(sorted(names)[:most])
    if len(names) > most:
        listed += f', ... ({len(names)} in all)'
    return listed


def read_json(path):
    """Raises: ValueError naming the file."""
    refuse_impostor(path)
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: not JSON: {e}') from None


def read_beside(path, name):
    """The JSON file `name` of the folder of weights that `path` is, or is in; {} where there is none."""
    if path.is_dir():
        folder = path
    elif path.name in WEIGHT_NAMES:
        folder = path.parent
    else:  # a file under a name of its own: what lies beside it need not be about it
        return {}
    if not (folder / name).is_file():
        return {}
    found = read_json(folder / name)
    if not isinstance(found, dict):
        raise ValueError(f'{folder / name}: a {type(found).__name__}; expected an object')
    return found


def weight_files(path):
    """The files that hold the weights: a file is its own, a folder is searched. Raises: ValueError."""
    if not path.is_dir():
        return [path]
    for name in WEIGHT_NAMES:
        index = f'{name}.index.json'
        if (path / index).is_file():
            try:
                parts = set(read_json(path / index)['weight_map'].values())
                # their last names alone: no way leads out of the folder
                return [path / Path(part).name for part in sorted(parts)]
            except (AttributeError, KeyError, TypeError):
                raise ValueError(f'{path / index}: no list of weights; expected a weight_map') from None
        if (path / name).is_file():
            return [path / name]
    raise ValueError(f'{path}: a folder without weights: expected one of {", ".join(WEIGHT_NAMES)}, or '
                     f'{WEIGHT_NAMES[0]}.index.json')


def open_weights(path):
    """Opens a file or a folder of weights -> ({name: tensor, or function that reads it}, about).

    `about` is a dict of what the file says beside the weights, of this project's own files and of TorchScript
    archives, as `read_torch_file` tells it.
    Raises: FileNotFoundError, ValueError.
    """
    tensors = {}
    about = {}
    for file in weight_files(path):
        if not file.is_file():
            raise FileNotFoundError(f'{file}: no such file; {path} names it as a part of its weights')
        if file.suffix == '.safetensors':
            tensors |= read_safetensors(file)
        else:
            part, beside = read_torch_file(file)
            tensors |= part
            about |= beside
    return tensors, about


def read_safetensors(path):
    """-> {name: function that reads the tensor}. Needs the package safetensors. Raises: ValueError."""
    refuse_impostor(path)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f'{path}: to read it, pip install safetensors') from None
    try:
        file = safe_open(path, framework='pt')
    except SafetensorError as e:
        raise ValueError(f'{path}: not a safetensors file ({e})') from None
    return {key: partial(file.get_tensor, key) for key in file.keys()}


def read_torch_file(path):
    """A file of torch.save, or a TorchScript archive -> ({name: tensor, or function that reads it}, about).

    `about` is a dict: of this project's own files what stands beside the weights, of an archive that it is
    one.
    Raises: ValueError.
    """
    try:
        if is_torchscript(path):
            return read_torchscript(path), {'torchscript': True}
    except (ValueError, *DAMAGED) as e:
        raise ValueError(f'{path}: not a file that can be read safely ({e})') from None
    saved = safe_load(path)
    if isinstance(saved, dict) and saved.get('kind') == 'encoder':
        return saved.pop('weights', {}), saved
    # training programs put the weights one or two levels down, beside their optimizer
    for level in ('model_state_dict', 'state_dict', 'state_dict_ema', 'model'):
        if not isinstance(saved, dict):
            return {}, {}
        if isinstance(saved.get(level), dict):
            saved = saved[level]
    return {key: t for key, t in saved.items() if torch.is_tensor(t)}, {}


# ----------------------------------------------------------------------------
# TorchScript, whose own loader would run the code in the archive

DTYPES = {
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'FloatStorage': torch.float32,
    'DoubleStorage': torch.float64,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
}


def is_torchscript(path):
    """Whether it is an archive with constants in it, which torch.save does not write."""
    if not zipfile.is_zipfile(path):
        return False
    return any(name.endswith('/constants.pkl') for name in zipfile.ZipFile(path).namelist())


def read_torchscript(path):
    """The tensors of a TorchScript archive, OpenAI's form -> {name: function that reads the tensor}.

    Its code is not touched, and the classes of its pickle become empty objects; anything but these and
    tensors is refused. Raises: ValueError, DAMAGED.
    """
    archive = zipfile.ZipFile(path)
    root = archive.namelist()[0].split('/')[0]
    module = ArchiveUnpickler(archive, root).load()
    return dict(tensors_of(module, ''))


class ArchiveUnpickler(pickle.Unpickler):
    """Reads the module of a TorchScript archive; a tensor becomes a function that reads it."""

    def __init__(self, archive, root):
        super().__init__(archive.open(f'{root}/data.pkl'))
        self.archive = archive
        self.root = root

    def find_class(self, module, name):
        """What stands for a class or function that the pickle asks for. Whatever is not listed is refused."""
        if module.split('.')[0] == '__torch__':
            return type(name, (), {})
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return self.later
        if (module, name) == ('collections', 'OrderedDict'):
            return dict
        if module == 'torch' and name.endswith('Storage'):
            return DTYPES[name]
        if module == 'torch.jit._pickle':  # wraps plain lists
            return unwrapped
        raise pickle.UnpicklingError(f'it wants {module}.{name}')

    def persistent_load(self, storage):
        return storage[1:3]  # dtype and number

    def later(self, storage, offset, size, stride, *_):
        """A function that reads the tensor, in the place of torch's own that builds it."""
        return partial(self.read_tensor, storage, offset, size, stride)

    def read_tensor(self, storage, offset, size, stride):
        dtype, number = storage
        data = bytearray(self.archive.read(f'{self.root}/data/{number}'))
        return torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset)


def unwrapped(value, *_):
    return value


def tensors_of(module, prefix):
    """Yields (name, function that reads the tensor) for a module of an archive and those inside it."""
    for key, value in vars(module).items():
        if isinstance(value, type):
            continue
        if callable(value):
            yield prefix + key, value
        elif hasattr(value, '__dict__'):
            yield from tensors_of(value, f'{prefix}{key}.')
