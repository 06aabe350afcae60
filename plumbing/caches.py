"""What generation keeps, so that nothing is computed twice; and halting, which ends passes early."""

from dataclasses import replace

import torch
import torch.nn.functional as F


class NoCache:
    """Of answers that go through the passes as a whole, as in training: nothing is kept."""

    positions = 0  # answer positions that are in it
    room = 0       # and those that there is room for

    def next_pass(self, context, layers, T):
        """What T states look at beside their own in the pass that begins, through these blocks.
        -> keys and values, (B, kv, S + P, hs) both, by block"""
        return context.layers

    def keep(self, layer, kept):
        """Takes what a block has looked at, (B, kv, S + P + T, hs) both: what `next_pass` gave, then keys and
        values of the states themselves."""

    def hide_empty(self, hidden):
        """Hides room that no state has taken yet. Shapes: (T, P + T) -> (T, P + T)"""
        return hidden

    def after_pass(self, states):
        """What a pass hands on. Shapes: (B, T, C) -> (B, T, C)."""
        return states

    def settled(self):
        """Whether more passes would change nothing."""
        return False

    def end_position(self, n):
        """After the last pass over n positions: those that follow begin with the first pass again."""


class Cache(NoCache):
    """What generation keeps: for every pass the keys and values of each block, those of the context first.

    None of it ever has to be computed again: what position t computes in a pass depends on positions up to t
    alone, and those do not change.
    """

    def __init__(self):
        self.positions = 0
        self.passes = []    # a list of keys and values for each pass, made when the first token gets there
        self.begun = 0      # passes of the present positions that have begun
        self.done = None    # rows whose answer has ended (B,)

    @property
    def room(self):
        return self.positions  # it grows with every token

    def next_pass(self, context, layers, T):
        if self.begun == len(self.passes):
            self.passes.append(list(context.layers))
        # counted as they come, so that a recursion with other passes needs nothing here
        self.begun += 1
        return self.passes[self.begun - 1]

    def keep(self, layer, kept):
        self.passes[self.begun - 1][layer] = kept

    def end_position(self, n):
        self.positions += n  # in place, where it is a tensor: what is recorded counts on that
        self.begun = 0


class FixedCache(Cache):
    """A cache with room for all positions from the start, for recordings: every token finds the same shapes
    on the same memory, and how many positions are taken is a tensor there. P is all the room.

    context: one of those that are answered about; the others have its shapes.
    """

    room = None  # in place of Cache's property, which cannot be set

    def __init__(self, context, room):
        super().__init__()
        self.room = room
        self.context = replace(context, mask=torch.empty_like(context.mask),
                               length=torch.empty_like(context.length))    # which `begin` fills
        self.positions = torch.zeros_like(context.length[0])           # ()

    def begin(self, context):
        """Takes a context, and forgets the answer to the one before."""
        S = context.mask.size(-1)
        self.context.layers = context.layers  # what a pass that is not there yet begins with
        self.context.mask.copy_(context.mask)
        self.context.length.copy_(context.length)
        self.positions.zero_()
        for of_pass in self.passes:
            for i, pair in of_pass.items():
                for kept, of_context in zip(pair, context.layers[i]):  # (B, kv, S + P, hs), (B, kv, S, hs)
                    kept[:, :, :S] = of_context
                    kept[:, :, S:] = 0  # not only hidden: even 0 * nan would be nan

    def next_pass(self, context, layers, T):
        if self.begun == len(self.passes):
            more = 0, 0, 0, T * self.room  # of dimension 2, at its end
            self.passes.append({i: [F.pad(kept, more) for kept in context.layers[i]] for i in layers})
        return super().next_pass(context, layers, T)

    def keep(self, layer, kept):
        for mine, given in zip(self.passes[self.begun - 1][layer], kept):  # (B, kv, S + P, hs), and T more
            T = given.size(2) - mine.size(2)
            S = mine.size(2) - T * self.room
            place = S + T * self.positions + torch.arange(T, device=given.device)  # (T,)
            mine.index_copy_(2, place, given[:, :, -T:])

    def end_position(self, n):
        super().end_position(n)
        self.context.layers = None  # every pass has them now

    def hide_empty(self, hidden):
        T = len(hidden)
        empty = torch.arange(T * self.room, device=hidden.device) >= T * self.positions    # (P,)
        return hidden | F.pad(empty, (0, T))                           # (T, P + T)


class Halting(Cache):
    """A cache for answers that think as long as they need: a pass that hardly moves the states of a token is
    its last. What later tokens read of it in deeper passes is what it had in its last one.

    A token has two passes at least, and a batch goes on until its slowest row has settled.
    """

    def __init__(self, halt):
        super().__init__()
        self.halt = halt    # hardly: by less than this share of their RMS
        self.taken = []     # passes that each token took, (B,) a token
        self.moving = None  # rows whose present token goes on (B,)
        self.states = None  # what the pass before handed on (B, T, C)

    def next_pass(self, context, layers, T):
        if self.begun == 0:  # a new token
            self.taken.append(torch.zeros_like(context.length))                    # (B,)
            everyone = torch.ones_like(context.length, dtype=torch.bool)           # (B,)
            self.moving = everyone if self.done is None else ~self.done
        else:
            if self.begun == len(self.passes):
                self.passes.append(list(context.layers))
            both = zip(self.passes[self.begun], self.passes[self.begun - 1])
            self.passes[self.begun] = [tuple(map(self.filled, now, before)) for now, before in both]
        return super().next_pass(context, layers, T)

    def filled(self, now, before):
        """Keys, or values, of a pass: tokens that did not get there have those of the pass before.
        Shapes: (B, kv, S + P or fewer, hs), (B, kv, S + P + T, hs) -> (B, kv, S + P, hs)"""
        T = self.states.size(1)  # of the present token, which is about to get there
        return torch.cat([now, before[:, :, now.size(2):-T]], dim=2)

    def after_pass(self, states):
        self.taken[-1] += self.moving
        if self.begun > 1:  # two passes tell how far the second one moved
            states = torch.where(self.moving[:, None, None], states, self.states)  # (B, T, C)
            moved = (states - self.states).float().square().mean((1, 2)).sqrt()    # (B,)
            size = states.float().square().mean((1, 2)).sqrt()                     # (B,): 1, but of 'rms'
            self.moving = self.moving & (moved >= self.halt * size)
        self.states = states
        return states

    def settled(self):
        # before a token's first pass `moving` is that of the token before
        return self.begun > 0 and not self.moving.any()

    def end_position(self, n):
        T = self.states.size(1)
        for k in range(1, self.begun):
            ended = (self.taken[-1] <= k)[:, None, None, None]         # (B, 1, 1, 1): before this pass
            for layer, layer_before in zip(self.passes[k], self.passes[k - 1]):
                for now, before in zip(layer, layer_before):           # (B, kv, S + P + T, hs) both
                    now[:, :, -T:] = torch.where(ended, before[:, :, -T:], now[:, :, -T:])
        super().end_position(n)
