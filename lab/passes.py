"""
What a decoder would say after every pass, how far its states moved, and where it looked.

    python -m lab.passes --out_dir=out/trm                  # some questions; writes passes.png there
    python -m lab.passes --out_dir=out/trm --inner_steps=16
    python -m lab.passes --out_dir=out/trm --image=cat.png --question="what is it?"
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from configurator import configure
from eval import exact_match, ids_of, load_run, questions_to_judge, set_depth
from lab.states import rms, watch_passes
from plumbing.console import printable, run_script
from plumbing.features import sound_tokens
from plumbing.files import write_whole
from plumbing.machine import pick_device
from plumbing.pictures import picture_sheet, rgb_picture
from plumbing.results import picture_of
from plumbing.run import read_checkpoint

SHOWN = ('1 hop', '2 hops', 'count', 'relation')  # question types
FONT = 13
SIDE = 112   # pixels of a drawn picture
GUESS = 190  # pixels that a guess and its bar take


@dataclass
class PassesConfig:
    out_dir: str = 'out/trm'        # the run to look into; passes.png is written there
    image: str | None = None        # a picture file: look at `question` about it
    question: str | None = None     # the question about `image`
    split: str = 'test'             # train, val or test
    dataset: str | None = None      # another dataset folder than the one of the run
    encoder: str | None = None      # where the encoder of the run lies now
    inner_steps: int | None = None  # another number of passes than in training
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')
        if (self.image is None) != (self.question is None):
            raise ValueError('--image and --question belong together: both or neither')
        if self.inner_steps is not None and self.inner_steps < 1:
            raise ValueError(f'inner_steps={self.inner_steps}: expected at least 1')


@dataclass
class Pass:
    """What one pass did to the states that make the first word of an answer."""
    guesses: list         # the five likeliest first words and their probabilities: [(text, 0..1), ...]
    moved: dict           # how far the states moved, as a share of their RMS: {'y': .., 'z': ..}
    looked: torch.Tensor  # mean attention of the first state, over heads and blocks (S + T,)

    def moves(self):
        return ', '.join(f'{name} moved {size:.2f}' for name, size in self.moved.items())


def attention_of(decoder, context, answer):
    """Attention of the answer's states, made again of what goes into every layer.

    Shapes: answer (B, A) -> a list with (B, nh, T, S + T) for every block of every pass, in their order
    """
    seen = []

    def note(attention, args):
        h, rope, mask, past = args
        q, k, _ = attention.queries_keys_values(h, rope)               # (B, nh or kv, T, hs) each
        k = torch.cat([past[0], k], dim=2)                             # (B, kv, S + T, hs)
        seen.append(attention.attention_weights(q, k, mask))           # (B, nh, T, S + T)

    hooks = [block.attention.register_forward_pre_hook(note) for block in decoder.blocks]
    try:
        decoder.answer_states(context, answer)
    finally:  # whoever asks again, after memory ended say, asks the decoder as it was
        for hook in hooks:
            hook.remove()
    return seen[decoder.config.n_layer - decoder.config.recur_layers:]  # without blocks that are passed once


def encode_and_share(encoder, picture, device):
    """The tokens of a picture, and how much of each patch the resampler put into each token.

    Shapes: -> tokens (1, N, D), shares (N, P)
    """
    image = encoder.preprocess(picture)[None]                          # (1, 3, S, S)
    patches = encoder.adapter(encoder.patches(image))                  # (1, P, W)
    if not encoder.config.n_latents:
        return encoder.projection(patches), torch.eye(patches.size(1), device=device)
    layers = []  # attention of the resampler, (1, nh, N, P) a layer
    tokens = encoder.resampler(patches, layers)                        # (1, N, W)
    return encoder.projection(tokens), torch.cat(layers).mean((0, 1))


@torch.no_grad()
def passes_of(decoder, vision, question, tokenizer, sound=None):
    """Every pass while the first word of an answer is made.

    With recursion='add' all but the last pass of a cycle make z, from which nothing is read: no guesses.
    Shapes: vision (1, N, D), None without use_vision; question (1, Q); sound (1, M, D) or None -> a list of
        Pass
    """
    c = decoder.config
    start = torch.tensor([[tokenizer.bos_id]], device=question.device)     # (1, 1)
    context = decoder.read_context(vision, question, sound)
    states = watch_passes(decoder)  # gets a pair for each pass: what goes in, what comes out, (1, T, C) both
    try:
        seen = attention_of(decoder, context, start)
    finally:
        del decoder.network  # unwatched again

    passes = []
    last = {}  # by name, what the pass before handed on; before the first one what went in
    if c.recursion != 'add':
        last = named(states[0][0], ('y', 'z')[:c.streams])
    for k, (_, after) in enumerate(states):
        if c.recursion != 'add':
            made = named(after, ('y', 'z')[:c.streams])
        else:
            makes_y = (k + 1) % (c.inner_steps + 1) == 0
            made = {'y' if makes_y else 'z': after}
        moved = {name: rms(state - last[name]) / rms(state) for name, state in made.items() if name in last}
        last |= made
        guesses = likeliest(decoder.head(made['y'])[0, 0], tokenizer) if 'y' in made else []
        blocks = seen[k * c.recur_layers:(k + 1) * c.recur_layers]     # (1, nh, T, S + T) each
        looked = torch.stack([att[0, :, 0].float().mean(0) for att in blocks]).mean(0)     # (S + T,)
        passes.append(Pass(guesses, moved, looked))
    return passes


def named(states, names):
    """Shapes: (1, T, C) -> {name: (1, 1, C)}"""
    return dict(zip(names, states.chunk(len(names), dim=1)))


def likeliest(logits, tokenizer, n=5):
    """The likeliest words and their probabilities. Shapes: (V,) -> [(text, 0..1), ...]"""
    best = logits.float().softmax(-1).topk(min(n, len(logits)))
    return [(word_of(tokenizer, token), p) for token, p in zip(best.indices.tolist(), best.values.tolist())]


def word_of(tokenizer, token):
    if token == tokenizer.eos_id:
        return '(end)'
    if token in (tokenizer.pad_id, tokenizer.bos_id):
        return '(mark)'
    return printable(tokenizer.piece(token).strip())


def places_of(one, shares):
    """Where in the picture a pass looked, row by row. Shapes: shares (N, P) -> (side, side)"""
    patches = one.looked[:len(shares)] @ shares.float()                # (P,)
    side = math.isqrt(len(patches))
    return patches[-side * side:].view(side, side).cpu()               # a trunk's class token stands first


def told(passes):
    """The passes as text, a line for each."""
    lines = []
    for k, one in enumerate(passes):
        guesses = '  '.join(f'{word} {p:.2f}' for word, p in one.guesses)
        lines.append(f'  pass {k + 1:2} | {one.moves()} | {guesses}')
    return '\n'.join(lines)


def draw_passes(small, words, passes, shares, n_sound):
    """A row for each pass: what it would say, with bars; the picture lit where it looks; and the question, a
    word the redder the more it is looked at. `n_sound`: sound tokens, M. Shapes: shares (N, P) -> a Pillow
    picture."""
    font = ImageFont.load_default(FONT)
    before = len(shares) + n_sound  # what of the context stands before the words
    text_px = int(sum(font.getlength(word) + 8 for word in words))
    strip = Image.new('RGB', (GUESS + SIDE + 20 + text_px, len(passes) * (SIDE + 4)), 'white')
    draw = ImageDraw.Draw(strip)
    for k, one in enumerate(passes):
        y = k * (SIDE + 4)
        for i, (word, p) in enumerate(one.guesses):
            top = y + 8 + i * 20
            end = 80 + int((GUESS - 120) * p)
            draw.rectangle((80, top, end, top + 14), 'steelblue')
            draw.text((0, top), word[:10], 'black', font)
            draw.text((end + 4, top), f'{p:.2f}', 'gray', font)

        places = places_of(one, shares)                                # (side, side)
        heat = Image.fromarray((255 * places / places.max()).byte().numpy())
        heat = heat.resize(small.size, Image.BICUBIC)
        strip.paste(Image.composite(small, Image.new('RGB', small.size), heat), (GUESS, y))

        weights = one.looked[before:before + len(words)].cpu()         # (Q,)
        x = GUESS + SIDE + 16
        draw.text((x, y + 18), f'pass {k + 1}: {one.moves()}', 'black', font)
        draw.text((x, y + 36), f'{weights.sum():.0%} on the question', 'gray', font)
        for word, weight in zip(words, weights / weights.max()):
            pale = int(255 - 190 * weight)
            box = (x, y + 58, x + font.getlength(word) + 5, y + 78)
            draw.rectangle(box, (255, pale, pale))
            draw.text((x + 3, y + 60), word, 'black', font)
            x += font.getlength(word) + 8
    return strip


def look(picture, question, ids, references, sound, decoder, encoder, tokenizer, most_tokens, device):
    """Prints the passes of one question. references: the true answers, [] where they are not known; sound:
    what it hears, (1, M, D) or None. -> the tile of a sheet and its colour"""
    with torch.no_grad():
        tokens, shares = encode_and_share(encoder, picture, device)
    vision = tokens[..., :decoder.config.vision_dim]                   # (1, N, D)
    asked = torch.tensor([ids], device=device)                         # (1, Q)
    passes = passes_of(decoder, vision, asked, tokenizer, sound)
    written = decoder.generate(vision, asked, most_tokens, sound=sound)
    answer = tokenizer.decode(written[0].tolist())
    says = f'says: {answer}'
    color = 'black'
    if references:
        says += f', true: {" / ".join(references[:3])}'
        color = 'darkgreen' if exact_match(answer, references) else 'firebrick'
    print(f'{printable(question)} | {printable(says)}\n{told(passes)}')

    words = [printable(tokenizer.piece(token)) for token in ids]
    small = Image.fromarray(encoder.pixels(picture).permute(1, 2, 0).numpy())  # as the encoder sees it
    n_sound = 0 if sound is None else sound.size(1)
    strip = draw_passes(small.resize((SIDE, SIDE), Image.BICUBIC), words, passes, shares, n_sound)
    return (strip, [question, says]), color


def chosen_rows(rows, types=SHOWN):
    """The first row of each type that has a picture; without such types, the first four."""
    seen = [i for i in range(len(rows)) if rows.picture[i] >= 0]
    first = {}
    for i in seen:
        first.setdefault(rows.type[i], i)
    if not seen:
        raise ValueError(f'{rows.path}: has no pictures to look at')
    return [first[type] for type in types if type in first] or seen[:4]


def main(argv=None):
    s, _ = configure(PassesConfig, sys.argv[1:] if argv is None else argv, '-m lab.passes')
    device = pick_device(s.device)
    checkpoint = read_checkpoint(s.out_dir)
    run = checkpoint['settings']
    decoder, encoders, tokenizer = load_run(checkpoint, device, s.encoder)
    encoder = encoders.get('encoder')
    if not encoder:
        raise ValueError(f'{s.out_dir}: a run without vision has no picture to look at')
    set_depth(decoder, s.out_dir, s.inner_steps, None)
    show = partial(look, decoder=decoder, encoder=encoder, tokenizer=tokenizer,
                   most_tokens=run['max_answer_tokens'], device=device)
    if s.image:
        picture = rgb_picture(Path(s.image).read_bytes())
        shown = [show(picture, s.question, ids_of(s.question, tokenizer), [], None)]
    else:
        questions = questions_to_judge(run, s.dataset, s.split, tokenizer)
        rows = questions.rows
        shown = [show(picture_of(rows, i), rows.question[i], questions.tokens[i][0], rows.references[i],
                      sound_tokens(rows.sound_of(i), encoders)) for i in chosen_rows(rows)]
    tiles, colors = zip(*shown)
    path = Path(s.out_dir) / 'passes.png'
    sheet = picture_sheet(tiles, columns=2, scale=1, colors=colors)
    write_whole(path, partial(sheet.save, format='PNG'))
    print(f'written: {path}')


if __name__ == '__main__':
    run_script(main)
