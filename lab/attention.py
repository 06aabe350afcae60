"""
Where every pass of the recursion looks, drawn for one question of each type.

    python -m lab.attention --out_dir=out/trm    # writes out/trm/attention.png
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from configurator import configure
from data import Questions
from eval import exact_match, load_run, picture_of, rows_to_judge, set_depth
from plumbing.console import printable, run_script
from plumbing.files import write_whole
from plumbing.machine import pick_device
from plumbing.pictures import picture_sheet
from plumbing.run import read_checkpoint

TYPES = ('1 hop', '2 hops', 'count', 'relation')
FONT = 13
SIDE = 112  # pixels of a drawn picture


@dataclass
class AttentionConfig:
    out_dir: str = 'out/trm'        # the run to look into; attention.png is written there
    split: str = 'test'             # train, val or test
    dataset: str | None = None      # another dataset folder than the one of the run
    encoder: str | None = None      # where the encoder of the run lies now
    inner_steps: int | None = None  # another number of passes than in training
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')


def attention_of(decoder, context, answer):
    """Attention of the answer's states, made again of what goes into every layer.

    Shapes: answer (B, A) -> a list with (B, nh, T, S + T) for every block of every pass, in their order
    """
    seen = []

    def note(attention, args):
        h, rope, mask, past = args
        q, k, _ = attention.queries_keys_values(h, rope)               # (B, nh or kv, T, hs) each
        k = torch.cat([past[0], k], dim=2)                             # (B, kv, S + T, hs)
        seen.append(attention.weights(q, k, mask))                     # (B, nh, T, S + T)

    hooks = [block.attention.register_forward_pre_hook(note) for block in decoder.blocks]
    decoder.answer_states(context, answer)
    for hook in hooks:
        hook.remove()
    return seen


def encode_and_share(encoder, picture, device):
    """The tokens of a picture, and how much of each patch the resampler put into each token.

    Shapes: -> tokens (1, N, D), shares (N, P)
    """
    image = encoder.preprocess(picture)[None].to(device)               # (1, 3, S, S)
    patches = encoder.adapter(encoder.patches(image))                  # (1, P, W)
    if not encoder.config.n_latents:
        return encoder.projection(patches), torch.eye(patches.size(1), device=device)
    layers = []  # attention of the resampler, (1, nh, N, P) a layer
    tokens = encoder.resampler(patches, layers)                        # (1, N, W)
    return encoder.projection(tokens), torch.cat(layers).mean((0, 1))


@torch.no_grad()
def passes_of(decoder, vision, question, bos_id):
    """Mean attention of the first state in every pass, while the first word of the answer is made.

    It is y's, or with recursion='add' z's and in the last pass y's.
    Shapes: vision (1, N, D), question (1, Q) -> one (S + T,) for each pass
    """
    start = torch.tensor([[bos_id]], device=question.device)           # (1, 1)
    seen = attention_of(decoder, decoder.read_context(vision, question), start)
    layers = [att[0, :, 0].float().mean(0) for att in seen]            # (S + T,) each: of all heads
    n = decoder.config.n_layer
    return [torch.stack(layers[i:i + n]).mean(0) for i in range(0, len(layers), n)]


def draw_passes(small, words, passes, shares):
    """A row for each pass: the picture, the picture lit where the pass looks, and the question, a word the
    redder the more it is looked at. Shapes: passes (S + T,) each, shares (N, P) -> a Pillow picture."""
    font = ImageFont.load_default(FONT)
    N = len(shares)
    side = math.isqrt(shares.size(1))
    text_px = int(sum(font.getlength(word) + 8 for word in words))
    strip = Image.new('RGB', (2 * SIDE + 20 + text_px, len(passes) * (SIDE + 4)), 'white')
    draw = ImageDraw.Draw(strip)
    for k, att in enumerate(passes):
        patches = att[:N] @ shares.float()                             # (P,)
        places = patches[-side * side:].view(side, side).cpu()         # a trunk's class token stands first
        weights = att[N:N + len(words)].cpu()                          # (Q,)
        heat = Image.fromarray((255 * places / places.max()).byte().numpy())
        heat = heat.resize(small.size, Image.BICUBIC)
        x = 2 * SIDE + 20
        y = k * (SIDE + 4)
        strip.paste(small, (0, y))
        strip.paste(Image.composite(small, Image.new('RGB', small.size), heat), (SIDE + 4, y))
        title = f'pass {k + 1}: {weights.sum():.0%} on the question'
        draw.text((x, y + SIDE // 2 - 30), title, 'gray', font)
        for word, weight in zip(words, weights / weights.max()):
            pale = int(255 - 190 * weight)
            box = (x, y + SIDE // 2 - 8, x + font.getlength(word) + 5, y + SIDE // 2 + 12)
            draw.rectangle(box, (255, pale, pale))
            draw.text((x + 3, y + SIDE // 2 - 6), word, 'black', font)
            x += font.getlength(word) + 8
    return strip


def draw_attention(path, decoder, encoder, tokenizer, rows, questions, device, types=TYPES):
    """Writes a sheet with one question of each type; without such types, the first four questions."""
    chosen = []
    for type in types:
        for i, type_of_row in enumerate(rows.type):
            if type_of_row == type:
                chosen.append(i)
                break
    tiles = []
    colors = []
    for i in chosen or range(min(4, len(rows))):
        picture = picture_of(rows, i)
        with torch.no_grad():
            tokens, shares = encode_and_share(encoder, picture, device)
        vision = tokens[..., :decoder.config.vision_dim]               # (1, N, D)
        ids = questions.tokens[i][0]
        question = torch.tensor([ids], device=device)                  # (1, Q)
        passes = passes_of(decoder, vision, question, tokenizer.bos_id)
        answer = decoder.generate(vision, question, questions.max_answer_tokens)
        answer = tokenizer.decode(answer[0].tolist())

        words = [printable(tokenizer.bpe.decode([token], errors='replace')) for token in ids]
        small = Image.fromarray(encoder.pixels(picture).permute(1, 2, 0).numpy())  # as the encoder sees it
        strip = draw_passes(small.resize((SIDE, SIDE), Image.BICUBIC), words, passes, shares)
        true = ' / '.join(rows.references[i][:3])
        tiles.append((strip, [rows.question[i], f'says: {answer}, true: {true}']))
        colors.append('darkgreen' if exact_match(answer, rows.references[i]) else 'firebrick')
    sheet = picture_sheet(tiles, columns=2, scale=1, colors=colors)
    write_whole(path, partial(sheet.save, format='PNG'))


def main(argv=None):
    s, _ = configure(AttentionConfig, sys.argv[1:] if argv is None else argv, '-m lab.attention')
    device = pick_device(s.device)
    checkpoint = read_checkpoint(s.out_dir)
    run = checkpoint['settings']
    decoder, encoder, tokenizer = load_run(checkpoint, device, s.encoder)
    if not encoder:
        raise ValueError(f'{s.out_dir}: a run without vision has no picture to look at')
    set_depth(decoder, s.out_dir, s.inner_steps, None)
    rows = rows_to_judge(s.dataset or run['dataset'], s.split)
    limits = run['max_question_tokens'], run['max_answer_tokens']
    questions = Questions(rows, tokenizer, *limits, truncate=True)
    path = Path(s.out_dir) / 'attention.png'
    draw_attention(path, decoder, encoder, tokenizer, rows, questions, device)
    print(f'written: {path}')


if __name__ == '__main__':
    run_script(main)
