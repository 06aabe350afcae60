"""
What a decoder thinks, pass by pass, as HTML: fragments for the page and for the file of lab.demo.

A figure holds every pass and shows one of them; its slider, or a click on a small picture, shows another.
Nothing in it is fetched: pictures are data, the script is seven lines, the fonts are the reader's own.
"""

import base64
import io
from dataclasses import dataclass
from html import escape

import torch
from PIL import Image

from lab.passes import places_of
from plumbing.console import printable

LOSSLESS_PX = 128  # larger pictures become JPEG, so that a dozen of them stay small
DARK = 0.72        # how dark it is where a pass does not look
FAR = 1.5          # a state that moves so many times its own size fills its bar


@dataclass
class Look:
    """A question to one run, and what came of it."""
    run: str               # its folder
    question: str
    answer: str
    references: list       # the true answers, [] where they are not known
    right: bool | None     # None: not known, or a caption, which is hardly ever word for word
    picture: Image.Image   # as the encoder sees it
    shares: torch.Tensor | None    # how much of each patch is in each image token (N, P); None: it is blind
    words: list            # the tokens of the question, as text
    passes: list           # of lab.passes.Pass
    notes: list            # sentences: why the answer may mean little
    n_sound: int           # tokens of the sound that it heard too, M; 0: none


def data_url(picture, format, **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return f'data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}'


def picture_url(picture):
    if max(picture.size) <= LOSSLESS_PX:
        return data_url(picture, 'PNG')
    return data_url(picture, 'JPEG', quality=80)


def light(one, shares):
    """A veil over the picture, a pixel for each patch, which lets through where a pass looks; '' where it
    cannot look. The browser makes it large and smooth."""
    if shares is None:
        return ''
    places = places_of(one, shares)                                    # (side, side)
    veil = 255 * DARK * (1 - places / places.max())                    # (side, side)
    alpha = Image.fromarray(veil.byte().numpy())
    black = Image.new('L', alpha.size)
    return f'<img alt="" src="{data_url(Image.merge("LA", (black, alpha)), "PNG")}">'


def bar(name, share, number, kind):
    """A line: its name, a bar of 0..1, the number."""
    width = f'{100 * min(1, share):.0f}%'
    return (f'<div class="line"><span>{escape(name)}</span><div class="full"><div class="{kind}" '
            f'style="width:{width}"></div></div><span>{number}</span></div>')


def guess_bars(one):
    if not one.guesses:
        return '<div class="mute">This pass changed z alone. There is no new y to read.</div>'
    return ''.join(bar(word, p, f'{p:.2f}', 'says') for word, p in one.guesses)


def move_bars(one):
    bars = [bar(name, size / FAR, f'{size:.2f}', 'moves') for name, size in one.moved.items()]
    return ''.join(bars) or '<div class="mute">as far as it came: this is its first state</div>'


def marked_words(words, weights):
    """The question, a word the redder the more it is looked at. Shapes: weights (Q,) -> HTML"""
    most = weights.max().item() or 1
    marked = []
    for word, weight in zip(words, weights.tolist()):
        color = f'rgba(235,80,50,{weight / most:.2f})'
        marked.append(f'<span style="background:{color}">{escape(word.strip()) or "&nbsp;"}</span>')
    return ' '.join(marked)


def stage(look, k, now):
    """One pass, large."""
    one = look.passes[k]
    N = 0 if look.shares is None else len(look.shares)
    M = look.n_sound
    weights = one.looked[N + M:N + M + len(look.words)].cpu()          # (Q,)
    sees = f'looks: {one.looked[:N].sum():.0%} at the picture'
    if look.shares is None:
        sees = 'this run never sees the picture'
    if M:
        sees += f'<br>listens: {one.looked[N:N + M].sum():.0%} at the sound'
    return f'''<div class="stage{now}" data-pass="{k + 1}">
<div><div class="label">{sees}</div>
<div class="picture{' unseen' if look.shares is None else ''}">{light(one, look.shares)}</div></div>
<div class="read"><div class="label"><b>y</b>, the answer so far, after <b>pass {k + 1}</b></div>
{guess_bars(one)}
<div class="label">moved (1 is its own size)</div>
{move_bars(one)}</div>
<div class="words"><div class="label">reads: {weights.sum():.0%} at the question</div>
{marked_words(look.words, weights)}</div></div>'''


def thumb(look, k, now):
    """One pass, small, to click on."""
    one = look.passes[k]
    word = one.guesses[0][0] if one.guesses else 'z'
    click = f"showPass(this.closest('figure'), {k + 1})"
    return f'''<div class="thumb{now}" data-pass="{k + 1}" onclick="{click}">
<div class="picture{' unseen' if look.shares is None else ''}">{light(one, look.shares)}</div>
<div class="mute">pass {k + 1}</div><div class="top">{escape(word)}</div></div>'''


def verdict(look):
    """The true answer, and whether that is what was said; '' where it is not known."""
    if not look.references:
        return ''
    true = escape(printable(' / '.join(look.references[:3])))
    if look.right is None:
        return f'<span class="mute">true: {true}</span>'
    kind, sign = ('right', '&#10003;') if look.right else ('wrong', '&#10007;')
    return f'<span class="{kind}">{sign} true: {true}</span>'


def figure(look):
    """All passes of one question to one run. -> HTML"""
    n = len(look.passes)
    # the last one is shown first: it gives the answer
    now = [''] * (n - 1) + [' now']
    slider = ''
    strip = '<div class="mute">A plain decoder: one pass, no recursion.</div>'
    if n > 1:
        slider = (f'<label class="slide"><span>pass</span><input type="range" aria-label="pass" min="1" '
                  f'max="{n}" value="{n}" oninput="showPass(this.closest(\'figure\'), this.value)"></label>')
        strip = ''.join(thumb(look, k, now[k]) for k in range(n))
    notes = ''.join(f'<div class="note">Take it with care: {escape(printable(note))}.</div>'
                    for note in look.notes)
    return f'''<figure class="look" style="--picture:url({picture_url(look.picture)})">
<div class="mute">{escape(printable(look.run))}</div>
<div class="question">{escape(printable(look.question))}</div>
<div>says <b class="answer">{escape(printable(look.answer)) or '(nothing)'}</b> {verdict(look)}</div>{notes}
{slider}
{''.join(stage(look, k, now[k]) for k in range(n))}
<div class="strip">{strip}</div></figure>'''


def side_by_side(looks):
    """The same question to several runs."""
    return f'<div class="looks">{"".join(map(figure, looks))}</div>'


def problem(sentence):
    """What the page shows instead of a figure."""
    return f'<div class="look problem">{escape(printable(sentence))}</div>'


INTRO = '''<div class="intro"><h2>See it think</h2>
Picture and question are read once. Then the same few blocks run again and again: each time is a <b>pass</b>.
<b>y</b> is the answer so far, <b>z</b> a scratchpad beside it (some runs have none).
After every pass we stop and ask y: the <b>blue bars</b> are the first word that it would say.
Where it looks, the picture is <b>bright</b> (point at it to see all), and words are <b>red</b>.</div>'''

STYLE = '''
.looks{display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start}
.look{box-sizing:border-box;margin:0;padding:14px;flex:1 1 29rem;max-width:min(34rem,100%);
  border:1px solid #8886;border-radius:12px;font:15px/1.45 system-ui,sans-serif}
.look .question{font-size:1.15em;font-weight:600;overflow-wrap:anywhere}
.look .answer{font-size:1.15em}
.look .right{color:#2b8a3e;background:#40c05722;border-radius:6px;padding:1px 7px}
.look .wrong{color:#d9480f;background:#ff6b3522;border-radius:6px;padding:1px 7px}
.look .mute,.look .label{opacity:.7;font-size:.85em}
.look .label{margin:0 0 4px}
.look .line + .label{margin-top:10px}
.look .note{border-left:3px solid #f08c00;padding-left:8px;margin:4px 0;font-size:.9em}
.look .slide{display:flex;gap:10px;align-items:center;margin:10px 0}
.look .slide input{flex:1;accent-color:#4682b4}
.look .stage{display:none;flex-wrap:wrap;gap:12px 18px;margin-top:10px}
.look .stage.now{display:flex}
.look .picture{position:relative;width:208px;aspect-ratio:1;border-radius:8px;overflow:hidden;
  background:var(--picture) 0 0/100% 100%}
.look .picture img{position:absolute;inset:0;width:100%;height:100%;margin:0;max-width:none}
.look .picture:hover img{opacity:0}
.look .unseen{filter:grayscale(1) opacity(.35)}
.look .read{flex:1 1 14rem}
.look .line{display:grid;grid-template-columns:5.5em 1fr 2.6em;gap:6px;align-items:center;margin:2px 0}
.look .line span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.look .line span:last-child{text-align:right;opacity:.7}
.look .full{height:14px;background:#8882;border-radius:4px}
.look .full div{height:100%;border-radius:4px}
.look .says{background:#4682b4}
.look .moves{background:#999}
.look .words{flex-basis:100%;line-height:1.9}
.look .words span{padding:2px 4px;border-radius:4px}
.look .strip{display:flex;gap:4px;overflow-x:auto;scrollbar-width:thin;margin-top:12px;padding:3px}
.look .thumb{flex:0 0 58px;text-align:center;cursor:pointer;border-radius:8px;padding:3px;line-height:1.25}
.look .thumb.now{box-shadow:0 0 0 2px #4682b4}
.look .thumb .picture{width:52px;border-radius:6px}
.look .thumb .top{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.look.problem{border-color:#f08c00}
.intro{max-width:46rem;font:16px/1.5 system-ui,sans-serif;margin-bottom:14px}
.intro h2{margin:0 0 6px}
'''

# shows pass k of a figure: large, and marked in the strip of small ones
SCRIPT = '''<script>
function showPass(figure, k) {
  for (const part of figure.querySelectorAll('[data-pass]'))
    part.classList.toggle('now', part.dataset.pass == k);
  figure.querySelector('input').value = k;
  figure.querySelector('.strip').scrollLeft = 62 * (k - 4);  // pixels from one to the next
}
</script>'''


def whole_file(rows_of_looks, title):
    """Figures as a file of their own: no server, and a policy by which the browser fetches nothing."""
    body = '\n'.join(f'<section>{side_by_side(looks)}</section>' for looks in rows_of_looks)
    return f'''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>{escape(printable(title))}</title>
<style>body{{margin:0 auto;padding:16px;max-width:72rem}} main{{display:flex;flex-wrap:wrap;gap:16px}}
section{{flex:1 1 29rem;max-width:100%}}{STYLE}</style>{SCRIPT}</head>
<body>{INTRO}<main>{body}</main></body></html>
'''
