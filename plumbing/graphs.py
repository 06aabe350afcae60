"""A training step, or a token of answers, recorded once for each shape and replayed: on a GPU a small model
waits not for the work of its step but for the launching of its kernels, a thousand and more."""

from contextlib import contextmanager
from functools import partial

import torch

from plumbing.caches import FixedCache
from plumbing.machine import mapped, on_device


def leaves(tensors):
    """The tensors of nested lists and dicts, in their order."""
    found = []
    mapped(found.append, tensors)
    return found


def shape_and_dtype(tensor):
    return tuple(tensor.shape), tensor.dtype


class Captured:
    """step(tensors, *settings) -> tensor, recorded for each key: the structure, shapes and dtypes of
    `tensors`, and `settings`. It may change weights, optimizers, a cache: memory that stays where it is.

    The first call with a key runs the step as it is, which makes what only a first step makes: states of
    optimizers, handles of libraries. The second records it, and from then on the recording is replayed.
    Every call is one step. A recording repeats the kernels, on the memory that they had, and none of the
    Python: a number that changes from step to step has to be a tensor among `tensors`, and no weight or state
    may be replaced by another tensor. No graph of autograd from before the first call may be alive then: its
    nodes would stay on the stream where they were made.

    tensors: nested lists and dicts of tensors, on the device or not, None where one is missing. Pinned memory
    may be read after the call still, and must not be overwritten. settings: what Python branches on.
    max_graphs: recordings that are kept; steps with further keys run as they are. recorder: as `OnGpu`.

    Raises: RuntimeError in the second call of a step that waits for the device, by .item() say.
    """

    def __init__(self, step, device, max_graphs=32, recorder=None):
        self.step = step
        self.device = device
        self.max_graphs = max_graphs
        self.recorder = recorder or OnGpu(device)
        self.known = set()    # keys that have had their first call
        self.recorded = {}    # key: (the inputs that are read, what replays, the result that is overwritten)
        self.has_warned = False  # that there are too many keys

    def __call__(self, tensors, *settings):
        key = str(mapped(shape_and_dtype, tensors)), settings  # as text: a dict cannot be a key
        with self.recorder.aside():
            if key in self.recorded:
                inputs, replay, result = self.recorded[key]
                for mine, given in zip(leaves(inputs), leaves(tensors)):
                    mine.copy_(given, non_blocking=True)
                replay()
            elif key in self.known and self.has_room():
                inputs = on_device(tensors, self.device, copy=True)
                replay, result = self.record(partial(self.step, inputs, *settings))
                self.recorded[key] = inputs, replay, result
                replay()  # to record is not to execute
            else:
                result = self.step(on_device(tensors, self.device), *settings)
                self.known.add(key)  # not before: it may have been interrupted
        # the next replay overwrites the result
        return result.detach().clone()

    def record(self, run):
        try:
            return self.recorder.record(run)
        except RuntimeError as e:  # out of memory, too
            raise RuntimeError(f'a step could not be recorded as a CUDA graph, {e}; '
                               '--graphs=false goes without graphs, slower and with less memory') from e

    def has_room(self):
        if len(self.recorded) == self.max_graphs and not self.has_warned:
            self.has_warned = True
            print(f'{self.max_graphs} CUDA graphs are recorded, steps of further shapes run without one, '
                  'slower: fewer shapes of batches would help')
        return len(self.recorded) < self.max_graphs


class Writer:
    """Writes answers with one recording for each shape of the contexts, which is replayed for every token.

    next_logits: as `Decoder.next_logits`, of a decoder whose config stays as it is. most: shapes that are
    kept, with the memory of a cache each; a further one takes the place of the oldest. recorder: as of
    `Captured`.
    """

    def __init__(self, next_logits, device, most=4, recorder=None):
        self.next_logits = next_logits
        self.device = device
        self.most = most
        self.recorder = recorder  # None: each shape has its own pool of memory, which goes with it
        self.kept = {}  # by shape: a cache, and what is recorded with it

    def begin(self, context, room):
        """Takes a context. -> a function of the last token, (B, 1), that remembers it and gives the logits of
        the next one, float32 (B, V).

        room: tokens of an answer, at most
        Raises: RuntimeError under autocast, whose copies of the weights do not last.
        """
        if torch.is_autocast_enabled(self.device.split(':')[0]):
            raise RuntimeError('a Writer under autocast: expected none around `generate`')
        shape = context.layers[0][0].shape, room
        if shape in self.kept and self.kept[shape][0].begun:  # its last token was interrupted
            del self.kept[shape]
        if shape not in self.kept:
            if len(self.kept) == self.most:
                del self.kept[next(iter(self.kept))]
            cache = FixedCache(context, room)
            step = partial(self.next_logits, cache.context, cache)
            self.kept[shape] = cache, Captured(step, self.device, recorder=self.recorder)
        cache, recorded = self.kept[shape]
        cache.begin(context)
        return recorded


def writer_of(decoder, device):
    """For `Decoder.generate`; None for a CPU, where launching costs nothing."""
    return Writer(decoder.next_logits, device) if device.startswith('cuda') else None


class OnGpu:
    """Records CUDA graphs, all in one pool of memory: one runs at a time, and none reads what another left.

    Every step is on one side stream: the default one cannot be recorded, and autograd adds a weight's
    gradients up on the stream where it met the weight first.

    Source: PyTorch's notes on CUDA graphs, docs.pytorch.org/docs/stable/notes/cuda.html
    """

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self):
        """On the side stream, which waits for what the current one has begun, as that does afterwards."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def record(self, run):
        """-> (what executes again all that run() did on the device, the memory of its result)"""
        graph = torch.cuda.CUDAGraph()
        # the thread that makes the next batch may pin memory meanwhile
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode='thread_local'):
            result = run()
        return graph.replay, result
