"""Other people's files of weights: safetensors, torch, TorchScript, in one piece or several; nothing in them
is run."""

import json
import pickle
import zipfile
from functools import partial

import torch

from plumbing.files import DAMAGED, safe_load


def as_tensor(t):
    """A tensor, or what the function reads that stands for one."""
    return t() if callable(t) else t


def first_few(names, most=8):
    return ', '.join(sorted(names)[:most]) + f', ... ({len(names)} in all)' * (len(names) > most)


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


def read_torch_file(path):
    """-> ({name: tensor, or a function that reads it}, about) of a file of torch.save or, read without
    running any of it, of a TorchScript archive. `about` is a dict: of this project's own files what stands
    beside the weights, of an archive that it is one."""
    try:
        if zipfile.is_zipfile(path) and any(
            name.endswith('/constants.pkl') for name in zipfile.ZipFile(path).namelist()
        ):
            return read_torchscript(path), {'torchscript': True}
    except (ValueError, *DAMAGED) as e:
        raise ValueError(f'{path}: not a file that can be read safely ({e})') from None
    saved = safe_load(path)
    if isinstance(saved, dict) and saved.get('kind') == 'encoder':
        return saved.pop('weights', {}), saved
    for level in ('model_state_dict', 'state_dict'):
        saved = saved.get(level, saved) if isinstance(saved, dict) else {}
    return {key: t for key, t in saved.items() if torch.is_tensor(t)}, {}


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


def read_torchscript(path):
    """The tensors of a TorchScript archive, OpenAI's form -> {name: function that reads the tensor}. Its code
    is not touched, and the classes of its pickle become empty objects; anything but these and tensors is
    refused. Raises: ValueError, DAMAGED."""
    archive = zipfile.ZipFile(path)
    root = archive.namelist()[0].split('/')[0]

    def read_tensor(storage, offset, size, stride):
        dtype, name = storage
        data = bytearray(archive.read(f'{root}/data/{name}'))
        return torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset)

    def tensor(storage, offset, size, stride, *_):
        return partial(read_tensor, storage, offset, size, stride)

    def itself(value, *_):
        return value

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
                return itself
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
