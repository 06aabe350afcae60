"""
See it think: a page that shows what a run says after every pass, and where it looks; the same as a file.

    python -m lab.demo --out_dir=out/trm                         # a page on this machine; Ctrl-C ends it
    python -m lab.demo --out_dir=out/trm --beside=out/plain      # two runs side by side
    python -m lab.demo --out_dir=out/trm --html=passes.html      # a dozen examples as a file, no server

The page needs gradio, which is told to ask nobody outside for anything; the file needs nothing.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from configurator import configure
from eval import exact_match, ids_of, load_run, questions_to_judge, set_depth
from lab.figures import INTRO, SCRIPT, STYLE, Look, problem, side_by_side, whole_file
from lab.passes import encode_and_share, passes_of
from plumbing.console import printable, run_script, what_to_mend
from plumbing.features import sound_tokens
from plumbing.files import write_whole
from plumbing.machine import pick_device
from plumbing.novelty import doubts
from plumbing.pictures import rgb_picture
from plumbing.results import picture_of, some_rows
from plumbing.run import read_checkpoint
from prepare.shapes import Config as ShapesConfig
from prepare.shapes import shapes_rows

MOST_PASSES = 64
MOST_SIGNS = 1000  # of a question
TEST, FILE, SCENE = 'test split', 'my file', 'drawn scene'


@dataclass
class DemoConfig:
    out_dir: str = 'out/trm'        # the run that is asked
    beside: str | None = None       # another run, asked the same
    html: str | None = None         # write a dozen examples into this file, and serve no page
    inner_steps: int | None = None  # passes to begin with; None: as in training
    dataset: str | None = None      # another dataset folder than the one of the run
    encoder: str | None = None      # where the encoder of out_dir lies now
    port: int | None = None         # of the page; None: the first free one from 7860 on
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...

    def __post_init__(self):
        check_passes(self.inner_steps)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f'port={self.port}: expected 1 to 65535')


def check_passes(n):
    """Raises: ValueError where n is a number, and not one of passes."""
    if n is not None and not 1 <= n <= MOST_PASSES:
        raise ValueError(f'inner_steps={n}: expected 1 to {MOST_PASSES} passes')


@dataclass
class Known:
    """What a dataset has with a question."""
    references: list            # the true answers
    is_caption: bool = False
    sound: bytes | None = None  # the file that is heard with the picture


NOTHING = Known([])


def known_of(rows, i):
    return Known(rows.references[i], rows.type[i] == 'describe', rows.sound_of(i))


class LoadedRun:
    """A trained run, and what it takes to ask it."""

    def __init__(self, out_dir, device, encoder_path=None):
        self.out_dir = out_dir
        self.device = device
        checkpoint = read_checkpoint(out_dir)
        self.settings = checkpoint['settings']
        self.seen = checkpoint.get('seen', {})
        self.decoder, self.encoders, self.tokenizer = load_run(checkpoint, device, encoder_path)
        self.encoder = self.encoders.get('encoder')
        self.trained = self.decoder.config

    @property
    def is_plain(self):
        return self.trained.kind == 'plain'

    def prefixes(self):
        """Beginnings of an image token that were trained to be embeddings: the decoder's own size is last."""
        if not self.encoder:
            return []
        D = self.trained.vision_dim
        return [d for d in self.encoder.config.prefixes if d < D] + [D]

    @torch.no_grad()
    def look(self, picture, question, known=NOTHING, passes=None, prefix=None):
        """Asks a question, with so many passes, and dimensions of a token after the first `prefix` as zeros.
        -> Look. Raises: ValueError where picture or question cannot be taken."""
        check_passes(passes)
        ids = self.ids_of(question)
        self.decoder.config = self.trained
        if not self.is_plain:
            set_depth(self.decoder, self.out_dir, passes, None)
        vision = None
        shares = None
        if self.encoder:
            tokens, shares = encode_and_share(self.encoder, picture, self.device)
            vision = tokens[..., :self.trained.vision_dim].clone()     # (1, N, D)
            shown = Image.fromarray(self.encoder.pixels(picture).permute(1, 2, 0).numpy())
        else:
            shown = picture.resize((64, 64))
        notes = doubts(self.seen, question, vision)
        if not self.is_plain and passes and passes > self.trained.inner_steps:
            notes.append(f'it makes {passes} passes and was trained with {self.trained.inner_steps}')
        if self.encoder and prefix and prefix < self.trained.vision_dim:
            vision[..., prefix:] = 0
            notes.append(f'it sees {prefix} of the {self.trained.vision_dim} dimensions it was trained with')
        asked = torch.tensor([ids], device=self.device)                # (1, Q)
        sound = sound_tokens(known.sound, self.encoders)               # (1, M, D)
        thought = passes_of(self.decoder, vision, asked, self.tokenizer, sound)
        written = self.decoder.generate(vision, asked, self.settings['max_answer_tokens'], sound=sound)
        answer = self.tokenizer.decode(written[0].tolist())
        right = None
        if known.references and not known.is_caption:
            right = bool(exact_match(answer, known.references))
        words = [printable(self.tokenizer.piece(token)) for token in ids]
        n_sound = 0 if sound is None else sound.size(1)
        return Look(self.out_dir, question, answer, list(known.references), right, shown, shares, words,
                    thought, notes, n_sound)

    def ids_of(self, question):
        """The tokens of a question. Raises: ValueError where there are none, or more than in training."""
        question = (question or '').strip()
        if not question:
            raise ValueError('type a question first')
        if len(question) > MOST_SIGNS:
            raise ValueError(f'the question has {len(question)} signs: expected {MOST_SIGNS} at most')
        return ids_of(question, self.tokenizer, self.settings['max_question_tokens'])


class Demo:
    """What the page does, one thing at a time, however many ask: looking into a decoder changes it. All is in
    one thread, which uses the memory of a large picture again: each of gradio's forty would keep its own."""

    def __init__(self, runs, rows):
        self.runs = runs
        self.rows = rows
        self.thread = ThreadPoolExecutor(1)

    def picture_and_questions(self, source, number, file):
        """-> a picture; the dataset's questions about it, {question: Known}.
        Raises: ValueError, OSError."""
        if source == FILE:
            if not file:
                raise ValueError('choose a picture file first')
            return rgb_picture(Path(file).read_bytes()), {}
        number = int(number or 0)
        if source == SCENE:
            drawn = shapes_rows(ShapesConfig(describe=0), 'demo', number, 1)
            known = {row['question']: Known([row['answer']]) for row in drawn}
            return rgb_picture(drawn[0]['image']), known
        rows = self.rows
        here = [i for i, picture in enumerate(rows.picture) if picture == number]
        if not here:
            raise ValueError(f'test picture {number}: expected 0 to {len(rows.pictures) - 1}')
        known = {rows.question[i]: known_of(rows, i) for i in here}
        return picture_of(rows, here[0]), known

    def questions(self, source, number, file):
        """The questions that fit a picture, a list; none where there is no picture."""
        try:
            return list(self.thread.submit(self.picture_and_questions, source, number, file).result()[1])
        except (ValueError, OSError):  # `answer` says what is wrong
            return []

    def answer(self, *asked):
        """The arguments of `figures` -> HTML: the figures, or a sentence that says why there are none."""
        try:
            return self.thread.submit(self.figures, *asked).result()
        except Exception as e:  # whatever it is, the page stays up for the next one
            return problem(what_to_mend(e) or f'this did not work: {type(e).__name__}: {e}')

    def figures(self, source, number, file, question, passes, prefix):
        picture, known = self.picture_and_questions(source, number, file)
        # a typed question is about a sound of the picture's too
        heard = next((one.sound for one in known.values() if one.sound), None)
        known = known.get((question or '').strip(), Known([], sound=heard))
        passes = int(passes) if passes else None
        return side_by_side([run.look(picture, question, known, passes, prefix) for run in self.runs])


def controls(gr, demo, passes):
    """The left side of the page. -> its parts by name"""
    pictures = len(demo.rows.pictures)
    first = demo.questions(TEST, 0, None)  # the page begins with the first test picture
    deep = [run for run in demo.runs if not run.is_plain]
    trained = '; '.join(f'{run.out_dir} was trained with {run.trained.inner_steps}' for run in deep)
    prefixes = sorted({d for run in demo.runs for d in run.prefixes()})
    return dict(
        source=gr.Radio([TEST, FILE, SCENE], value=TEST, label='Picture'),
        number=gr.Slider(0, pictures - 1, 0, step=1, label='Which one'),
        file=gr.File(label='A picture file', visible=False),
        fitting=gr.Dropdown(first, value=first[0] if first else None, label='A question that fits it'),
        question=gr.Textbox(first[0] if first else '', label='or yours', elem_id='question'),
        ask=gr.Button('Ask', variant='primary', elem_id='ask'),
        passes=gr.Slider(1, MOST_PASSES, passes or max((run.trained.inner_steps for run in deep), default=1),
                         step=1, label='Passes', info=trained, visible=bool(deep), elem_id='passes'),
        prefix=gr.Radio(prefixes, value=prefixes[-1] if prefixes else None, visible=len(prefixes) > 1,
                        label='Dimensions of an image token that are kept',
                        info='The others are set to zero. The encoder put first what matters most; the '
                             'decoder was trained with all.'))


def build_page(gr, demo, passes):
    """The page, in gradio's terms."""
    with gr.Blocks(title='See it think', analytics_enabled=False, fill_width=True,
                   delete_cache=(600, 600)) as page:
        gr.HTML(INTRO)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                part = controls(gr, demo, passes)
            with gr.Column(scale=3, min_width=320):
                asked = [part[name] for name in ('source', 'number', 'file', 'question', 'passes', 'prefix')]
                figures = gr.HTML(demo.answer(*(component.value for component in asked)), elem_id='figures')
        where = asked[:3]

        def choose(source, number, file):
            """Another picture: the questions that fit it; without any, the one that was typed stays."""
            found = demo.questions(source, number, file)
            first = found[0] if found else gr.skip()
            return (gr.update(visible=source != FILE), gr.update(visible=source == FILE),
                    gr.update(choices=found, value=found[0] if found else None, visible=bool(found)), first)

        def take(question):
            return question

        answered = dict(fn=demo.answer, inputs=asked, outputs=figures, show_progress='hidden')
        changed = gr.on([part['source'].change, part['number'].change, part['file'].change], choose, where,
                        [part['number'], part['file'], part['fitting'], part['question']],
                        trigger_mode='always_last', show_progress='hidden')
        changed.then(**answered)
        part['fitting'].input(take, part['fitting'], part['question']).then(**answered)
        gr.on([part['ask'].click, part['question'].submit], **answered, api_name='answer')
        gr.on([part['passes'].change, part['prefix'].change], **answered, trigger_mode='always_last')
    return page


def open_gradio():
    """gradio, which must hear before it is imported that nothing shall be reported. Raises: ValueError."""
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    os.environ['HF_HUB_OFFLINE'] = '1'
    try:
        import gradio
    except ImportError:
        raise ValueError('the page needs gradio: pip install gradio; without it --html=passes.html writes '
                         'the same figures into a file') from None
    return gradio


def serve(gr, page, port):
    """Serves the page to this machine alone, until Ctrl-C."""
    # the reader's own fonts: gradio's would be fetched
    fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['monospace'])
    try:
        page.launch(server_name='127.0.0.1', server_port=port, share=False, ssr_mode=False, quiet=True,
                    prevent_thread_lock=True, theme=gr.themes.Default(primary_hue='blue', **fonts), css=STYLE,
                    head=SCRIPT, footer_links=[], max_file_size='100mb')
    except OSError:
        raise ValueError(f'port={port}: in use; choose another --port, or leave it out') from None
    print(f'open {page.local_url} ; Ctrl-C ends it', flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def write_file(path, runs, rows, passes, n=12):
    """A dozen questions of the split, every type in turn, as a file."""
    seen = [i for i in some_rows(rows, n) if rows.picture[i] >= 0]  # a row may have a sound alone
    looks = [[run.look(picture_of(rows, i), rows.question[i], known_of(rows, i), passes) for run in runs]
             for i in seen]
    data = whole_file(looks, ' and '.join(run.out_dir for run in runs)).encode()

    def write(file):
        file.write(data)

    write_whole(path, write)
    print(f'written: {path}, {len(data) / 1000:.0f} kB')


def main(argv=None):
    s, _ = configure(DemoConfig, sys.argv[1:] if argv is None else argv, '-m lab.demo')
    gr = None if s.html else open_gradio()  # before the run is read: who lacks it hears so at once
    device = pick_device(s.device)
    runs = [LoadedRun(s.out_dir, device, s.encoder)]
    if s.beside:
        runs.append(LoadedRun(s.beside, device))
    rows = questions_to_judge(runs[0].settings, s.dataset, 'test', runs[0].tokenizer).rows
    if not len(rows.pictures):
        raise ValueError(f'{rows.path}: has no pictures to show')
    if s.html:
        write_file(s.html, runs, rows, s.inner_steps)
        return
    serve(gr, build_page(gr, Demo(runs, rows), s.inner_steps), s.port)


if __name__ == '__main__':
    run_script(main)
