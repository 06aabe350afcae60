"""Where every pass of the recursion looks.

    python -m lab.attention --out_dir=out/trm"""
import math

import torch
from PIL import Image, ImageDraw, ImageFont

from eval import exact_match, picture_of
from plumbing.console import printable
from plumbing.files import write_whole
from plumbing.pictures import picture_sheet


@torch.no_grad()
def draw_attention(path, decoder, encoder, tokenizer, rows, questions, device, types=('1 hop', '2 hops', 'count', 'relation'), image_px=112):
    """Writes a sheet that shows, for a question of each type, where every call of F looks while the first word of the answer is made:
    a row a call, in the picture (the attention to each image token, spread over the patches that the Perceiver made the token of) and
    in the question (red). Mean over heads and blocks, of y, or with recursion='add' of z and, in the last row, y.
    """
    font, tiles, colors = ImageFont.load_default(13), [], []
    chosen = [next((i for i, t in enumerate(rows.type) if t == type), None) for type in types]
    for i in [i for i in chosen if i is not None] or range(min(4, len(rows))):
        picture, read, watch = picture_of(rows, i), [], []
        patches = encoder.adapter(encoder.patches(encoder.preprocess(picture)[None].to(device)))   # (1, P, W)
        tokens = encoder.resampler(patches, read) if encoder.config.n_latents else patches
        vision = encoder.projection(tokens)[..., :decoder.config.vision_dim]           # (1, N, D)
        N, side = tokens.size(1), math.isqrt(patches.size(1))
        shares = torch.cat(read).mean((0, 1)) if read else torch.eye(N, device=device)       # (N, P)
        question = torch.tensor([questions.questions[i]], device=device)
        decoder.answer_states(decoder.read_context(vision, question), torch.tensor([[tokenizer.bos_id]], device=device), watch=watch)
        said = tokenizer.decode(decoder.generate(vision, question, questions.max_answer_tokens)[0].tolist())

        words = [printable(tokenizer.bpe.decode([t], errors='replace')) for t in questions.questions[i]]
        small = Image.fromarray(encoder.pixels(picture).permute(1, 2, 0).numpy()).resize((image_px, image_px), Image.BICUBIC)  # as it is seen
        strip = Image.new('RGB', (2 * image_px + 20 + int(sum(font.getlength(word) + 8 for word in words)), len(watch) * (image_px + 4)), 'white')
        draw = ImageDraw.Draw(strip)
        for step, (_, seen) in enumerate(watch):
            att = torch.stack([a[0, :, 0].float().mean(0) for a in seen]).mean(0)      # (S + T,), of the first state
            places, weights = (att[:N] @ shares.float())[-side * side:].view(side, side).cpu(), att[N:N + len(words)].cpu()
            heat = Image.fromarray((255 * places / places.max()).byte().numpy()).resize(small.size, Image.BICUBIC)
            x, y = 2 * image_px + 20, step * (image_px + 4)
            strip.paste(small, (0, y))
            strip.paste(Image.composite(small, Image.new('RGB', small.size), heat), (image_px + 4, y))
            draw.text((x, y + image_px // 2 - 30), f'step {step + 1}: {weights.sum():.0%} on the question', 'gray', font)
            for word, weight in zip(words, weights / weights.max()):
                draw.rectangle((x, y + image_px // 2 - 8, x + font.getlength(word) + 5, y + image_px // 2 + 12), (255, *[int(255 - 190 * weight)] * 2))
                draw.text((x + 3, y + image_px // 2 - 6), word, 'black', font)
                x += font.getlength(word) + 8
        tiles.append((strip, [rows.question[i], f"says: {said}, true: {' / '.join(rows.references[i][:3])}"]))
        colors.append('darkgreen' if exact_match(said, rows.references[i]) else 'firebrick')
    write_whole(path, lambda f: picture_sheet(tiles, columns=2, scale=1, colors=colors).save(f, 'PNG'))
