"""A tape: what a CUDA graph is on a GPU, on the CPU. For tests of what is recorded once and replayed."""

from contextlib import ExitStack, nullcontext
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# operators whose result the host has to see, or whose result has a size that depends on it
WAITS = {'_local_scalar_dense', 'nonzero', '_unique', '_unique2', 'unique_dim', 'unique_consecutive', 'unique_dim_consecutive', 'masked_select', 'equal',
         'bincount', '_linalg_check_errors'}
# functions that leave no trace among the operators where the device is the CPU itself
WAITS_ON_GPU = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.from_numpy}


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def refuse(name):
    raise RuntimeError(f'{name}: the host waits for the device')


def refuse_generator(*args, **kwargs):
    """As CUDA's generator does: checkpoint() asks for its state, but for preserve_rng_state=False."""
    raise RuntimeError('the state of the random generator is out of reach while a graph is recorded')


def refuse_optimizer(optimizer):
    """As torch.optim does while a graph is recorded, with fused=True too."""
    if not all(group['capturable'] for group in optimizer.param_groups):
        raise RuntimeError(f'{type(optimizer).__name__}: capturable is False while a graph is recorded')


def has_mask(indices):
    """Whether a place in x[indices] is a mask, whose ones have to be counted."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def waits(op, args, kwargs):
    """Whether the host has to wait for an operator on a GPU."""
    name = op.overloadpacket.__name__
    if name == 'repeat_interleave':
        return op is aten.repeat_interleave.Tensor and kwargs.get('output_size') is None
    if name == 'index':
        return has_mask(args[1])
    if name in ('index_put', 'index_put_', '_index_put_impl_'):
        return has_mask(args[1]) and args[2].numel() != 1  # a single value is a masked_fill
    return name in WAITS


class Functions(TorchFunctionMode):
    """Refuses functions that a GPU would have to wait for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # one without a device is a number on the host: it may take part, and stays what it was
        copies = function in (torch.tensor, torch.as_tensor) and 'device' in kwargs and not torch.is_tensor(args[0])
        if copies or function in WAITS_ON_GPU:
            refuse(function.__name__)
        return function(*args, **kwargs)


class Tape(TorchDispatchMode):
    """Records the operators that run inside of it. Afterwards nothing has happened: memory that was there before is as it was, and new memory is full of NaN."""

    def __init__(self):
        super().__init__()
        self.ops = []     # (operator, args, kwargs, [(which of its results, the memory it goes to), ...])
        self.made = {}    # address: memory that was made on the way
        self.before = {}  # address: (memory that was there before and is written to, what it held)

    def __enter__(self):
        self.generator = torch.get_rng_state()
        self.refusing = ExitStack()
        self.refusing.enter_context(patch.object(torch, 'get_rng_state', refuse_generator))
        self.refusing.enter_context(patch.object(torch.optim.Optimizer, '_accelerator_graph_capture_health_check', refuse_optimizer))
        self.refusing.enter_context(Functions())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.refusing.close()
        torch.set_rng_state(self.generator)
        for storage, held in self.before.values():
            storage.copy_(held)
        for storage in self.made.values():
            storage.fill_(255)  # all ones: a NaN, in every dtype of floats

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(op, args, kwargs):
            refuse(op)
        for argument, value in self.arguments(op, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_in(value):
                    self.keep(tensor.untyped_storage())
        results = op(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        new = [(k, t) for k, t in enumerate(tensors_in(results)) if t.untyped_storage().data_ptr() not in given]
        for _, tensor in new:
            self.made[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        # a view, or a note for the profiler, does nothing
        if new or op._schema.is_mutable and tensors_in((args, kwargs)):
            self.ops.append((op, args, kwargs, new))
        return results

    def arguments(self, op, args, kwargs):
        """(argument as the operator declares it, its value) of those that are given."""
        named = [(a, kwargs[a.name]) for a in op._schema.arguments if a.name in kwargs]
        return [*zip(op._schema.arguments, args), *named]

    def keep(self, storage):
        address = storage.data_ptr()
        if address not in self.made and address not in self.before:
            self.before[address] = storage, storage.clone()

    @torch.no_grad()
    def replay(self):
        """Executes all of it again, on the same memory."""
        with torch.autocast('cpu', enabled=False):  # the casts are on the tape
            for op, args, kwargs, new in self.ops:
                results = tensors_in(op(*args, **kwargs))
                for k, memory in new:
                    memory.copy_(results[k])


class OnTape:
    """In the place of plumbing.graphs.OnGpu."""

    def aside(self):
        return nullcontext()

    def record(self, run):
        tape = Tape()
        with tape:
            result = run()
        return tape.replay, result
