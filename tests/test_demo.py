"""lab.demo: figures and the file; questions in a terminal; the page, in a headless Chromium, under load and with bad input."""

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import TINY

import eval as evaluation
from data import open_tokenizer, read_rows, train_bpe
from encoder import load_encoder
from lab import demo, figures
from model import ModelConfig, build_model
from plumbing.console import run_script
from plumbing.results import picture_of

KINDS = dict(concat=dict(inner_steps=3), add=dict(recursion='add', inner_steps=3), loop=dict(recursion='loop', inner_steps=3), plain=dict(kind='plain'),
             blind=dict(use_vision=False, inner_steps=3), pretrained=dict(norm='rms', recursion='loop', inner_steps=3, recur_layers=1), narrow=dict(inner_steps=3, vision_dim=8))


@pytest.fixture
def bare(monkeypatch, tiny_shapes, tiny_encoder):
    """Makes read_checkpoint and load_run give runs with random weights: their folder is their kind."""
    rows = read_rows(tiny_shapes, 'test')
    state = train_bpe([*rows.question, *(r[0] for r in rows.references)], 400)

    def read(out_dir):
        settings = dict(dataset=str(tiny_shapes), max_question_tokens=40, max_answer_tokens=3, use_vision=out_dir != 'blind', out_dir=out_dir)
        return dict(settings=settings, seen=dict(words=['is', 'what', 'color', 'the', 'circle']))

    def load(checkpoint, device, *paths):
        tokenizer = open_tokenizer(state)
        marks = dict(pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        torch.manual_seed(0)
        kind = checkpoint['settings']['out_dir']
        decoder = build_model(ModelConfig(**dict(vocab_size=tokenizer.vocab_size, n_head=2, n_embd=16, vision_dim=16) | marks | KINDS[kind]))
        encoders = {} if kind == 'blind' else dict(encoder=load_encoder(str(tiny_encoder)).eval())
        return decoder.eval(), encoders, tokenizer

    for module in (demo, evaluation):
        monkeypatch.setattr(module, 'read_checkpoint', read)
        monkeypatch.setattr(module, 'load_run', load)
    return rows


@pytest.mark.parametrize('kind', KINDS)
def test_file(kind, bare, tmp_path, capsys):
    """The file shows a dozen questions to a run of any kind with all their passes; it is small and nothing in it leads outside; where a run sees no picture, this is said."""
    demo.main([f'--out_dir={kind}', f'--html={tmp_path}/passes.html', '--device=cpu', f'--dataset={bare.path.parent}'])
    text = (tmp_path / 'passes.html').read_text()
    assert 'passes.html, ' in capsys.readouterr().out and len(text) < 400_000
    assert not re.search(r'(src|href)="(?!data:)|url\((?!data:)|https?:|@import', text) and "default-src 'none'" in text
    n = dict(plain=1, add=4).get(kind, 3)
    assert text.count('<figure') == 12 and text.count('class="stage') == 12 * n and text.count('class="stage now"') == 12
    assert text.count('type="range"') == 12 * (n > 1) and text.count('true: ') == 12
    assert text.count('changed z alone') == 12 * 3 * (kind == 'add') and text.count('never sees the picture') == 12 * n * (kind == 'blind')
    assert text.count('<img ') == (0 if kind == 'blind' else 12 * (n + n * (n > 1)))


def test_look(bare):
    """A look is what the decoder says with so many passes; a prefix changes what it sees, whole tokens do not; what was changed for one question is undone for the next."""
    run = demo.LoadedRun('concat', 'cpu')
    picture = picture_of(bare, 0)
    usual = run.look(picture, 'what color is the circle?', demo.Known(['red']))
    deep = run.look(picture, 'what color is the circle?', passes=7)
    assert len(usual.passes) == 3 and len(deep.passes) == 7 and deep.notes == ['it makes 7 passes and was trained with 3'] and not usual.notes
    assert deep.passes[2].guesses == usual.passes[2].guesses and usual.right is (usual.answer == 'red') and deep.right is None
    assert run.prefixes() == [4, 8, 16] and demo.LoadedRun('narrow', 'cpu').prefixes() == [4, 8] and demo.LoadedRun('blind', 'cpu').prefixes() == []
    four = run.look(picture, 'what color is the circle?', prefix=4)
    assert four.passes[0].guesses != usual.passes[0].guesses and 'it sees 4 of the 16 dimensions' in four.notes[0]
    run.encoder.projection.weight.data[4:] = 0
    run.encoder.projection.bias.data[4:] = 0
    assert run.look(picture, 'what color is the circle?').passes[0].guesses == run.look(picture, 'what color is the circle?', prefix=4).passes[0].guesses


def test_light(bare):
    """The veil is thinnest where a pass looks most, and as dark as it gets where it never looks."""
    run = demo.LoadedRun('concat', 'cpu')
    look = run.look(picture_of(bare, 0), 'what color is the circle?')
    one = look.passes[0]
    one.looked = torch.zeros_like(one.looked)
    one.looked[2] = 1
    shares = torch.zeros(4, 64)
    shares[2, 9] = 1  # the third token is made of the patch in the second row and column
    veil = Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]+)', figures.light(one, shares)).group(1))))
    alpha = veil.getchannel('A')
    assert veil.size == (8, 8) and alpha.getpixel((1, 1)) == 0 and alpha.getpixel((0, 0)) == int(255 * figures.DARK)
    assert Image.open(io.BytesIO(base64.b64decode(figures.picture_url(Image.new('RGB', (300, 300))).split(',')[1]))).format == 'JPEG'


SLY = '<img src=x onerror=f()>${1}{{2}}'


def test_page_answers(bare, tmp_path):
    """Every picture and question gets figures or a sentence, whatever it is; a question's own signs are no HTML; the next question is answered as if nothing had been."""
    page = demo.Demo([demo.LoadedRun('concat', 'cpu'), demo.LoadedRun('plain', 'cpu')], bare)
    (tmp_path / 'text.png').write_text('hello')
    Image.new('L', (9000, 3), 99).save(tmp_path / 'thin.png')
    first = page.questions(demo.TEST, 0, None)
    assert first == [bare.question[i] for i in range(len(bare)) if bare.picture[i] == 0] and len(page.questions(demo.SCENE, 3, None)) > 4
    usual = page.answer(demo.TEST, 0, None, first[0], 3, 16)
    assert usual.count('<figure') == 2 and usual.count('class="stage') == 3 + 1 and 'true: ' in usual
    ask = 'what color is it?'
    for args, sentence in [((demo.FILE, 0, str(tmp_path / 'text.png'), ask, 3, 16), 'not a picture: '), ((demo.FILE, 0, None, ask, 3, 16), 'choose a picture file first'),
                           ((demo.FILE, 0, str(tmp_path / 'none.png'), ask, 3, 16), 'No such file'), ((demo.TEST, 0, None, ' ', 3, 16), 'type a question first'),
                           ((demo.TEST, 0, None, None, 3, 16), 'type a question first'), ((demo.TEST, 0, None, 'why ' * 2500, 3, 16), 'has 9999 signs: expected 1000 at most'),
                           ((demo.TEST, 0, None, 'why ' * 60, 3, 16), 'tokens: expected 40 at most, as in training'), ((demo.TEST, 99, None, ask, 3, 16), 'test picture 99: expected 0 to 19'),
                           ((demo.TEST, 0, None, ask, 65, 16), 'expected 1 to 64 passes'),
                           ((demo.TEST, 0, None, ask, 'x', 16), 'invalid literal')]:
        said = page.answer(*args)
        assert 'look problem' in said and sentence in said and '<figure' not in said and 'Traceback' not in said, said
    assert page.questions(demo.FILE, 0, None) == [] == page.questions(demo.TEST, 99, None)
    assert page.answer(demo.FILE, 0, str(tmp_path / 'thin.png'), ask, 3, 16).count('<figure') == 2 == page.answer(demo.TEST, 0, None, '\ud800', 3, 16).count('<figure')
    assert 'true: ' in page.answer(demo.SCENE, 3, None, page.questions(demo.SCENE, 3, None)[0], 3, 16)
    sly = page.answer(demo.TEST, 0, None, SLY, 3, 16)
    assert '<img src=x' not in sly and sly.count('&lt;img src=x onerror=f()&gt;${1}{{2}}') == 2
    assert page.answer(demo.TEST, 0, None, first[0], 3, 16) == usual


def test_the_decoder_is_left_as_it_was(bare, monkeypatch):
    """Where looking breaks off, memory having ended say, the hooks are off and the next question is answered."""
    page = demo.Demo([demo.LoadedRun('concat', 'cpu')], bare)
    args = (demo.TEST, 0, None, 'what color is it?', 3, 16)
    usual = page.answer(*args)
    with monkeypatch.context() as patch:
        patch.setattr('lab.passes.torch.cat', lambda *_, **__: (_ for _ in ()).throw(RuntimeError('out of memory')))
        assert 'out of memory' in page.answer(*args)
    decoder = page.runs[0].decoder
    assert 'network' not in vars(decoder) and not any(block.attention._forward_pre_hooks for block in decoder.blocks) and page.answer(*args) == usual


def test_questions_in_a_terminal(bare, tmp_path, monkeypatch, capsys):
    """Without a question eval.py answers line after line, from a pipe without a prompt; a bad one gets a sentence; an empty line or the end is the end."""
    bare_picture = tmp_path / 'a.png'
    bare_picture.write_bytes(bare.pictures[0])
    argv = ['--out_dir=concat', f'--image={bare_picture}', '--device=cpu']

    def asked(text, terminal=False):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
        sys.stdin.isatty = lambda: terminal
        evaluation.main(argv)
        return capsys.readouterr()

    evaluation.main([*argv, '--question=what color is the circle?'])
    one = capsys.readouterr().out
    two = asked('what color is the circle?\nwhat color is the circle?\n\nwhat color is the circle?\n')
    assert two.out == 2 * one and two.err == ''
    said = asked('what color is the circle?\n' + 'why ' * 60 + '\nwhat zebra\nwhat color is the circle?', terminal=True)
    assert said.out.count('question: ') == 5 and said.out.count(one) == 2 and 'tokens: expected 40 at most' in said.err and 'has the word zebra' in said.err


def test_mistakes(bare, monkeypatch, capsys):
    """Without gradio a line says how to get it; a setting out of range is one line."""
    monkeypatch.setitem(sys.modules, 'gradio', None)
    for argv, message in (['--out_dir=concat'], 'the page needs gradio: pip install gradio'), (['--inner_steps=0'], 'inner_steps=0: expected 1 to 64'), (['--port=0'], 'port=0: expected'), (['--html=/nowhere/x.html', '--out_dir=plain', '--device=cpu'], '/nowhere'):
        monkeypatch.setattr(sys, 'argv', ['lab', *argv])
        with pytest.raises(SystemExit) as end:
            run_script(demo.main)
        text = capsys.readouterr().err
        assert end.value.code == 1 and text.strip().count('\n') == 0 and message in text


# ----------------------------------------------------------------------------
# the page itself: where gradio is installed, and for the last one selenium and Chromium

needs_gradio = pytest.mark.skipif(not importlib.util.find_spec('gradio'), reason='gradio is not installed: pip install gradio')
CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER and importlib.util.find_spec('selenium')),
                                    reason='needs chromium, chromedriver (apt-get install chromium-driver) and pip install selenium')


@pytest.fixture(scope='module')
def page(tiny_shapes, tiny_encoder, tmp_path_factory):
    """A page that serves a tiny run. -> its process and address"""
    import train
    here = tmp_path_factory.mktemp('page')
    train.main([*TINY, '--max_steps=1', '--eval_interval=1', f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--cache_dir={here}/cache', f'--out_dir={here}/run'])
    argv = [sys.executable, '-m', 'lab.demo', f'--out_dir={here}/run', f'--beside={here}/run', '--device=cpu']
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(TMPDIR=str(here), OMP_NUM_THREADS='1'))
    line = process.stdout.readline()
    assert 'open http://127.0.0.1:' in line, process.communicate()
    yield process, re.search(r'http://127\.0\.0\.1:\d+/', line).group()
    if process.poll() is None:
        process.kill()


def memory(process):
    """Of a process, in MB."""
    return int(re.search(r'VmRSS:\s+(\d+)', open(f'/proc/{process.pid}/status').read()).group(1)) / 1000


@needs_gradio
@needs_chromium
def test_page_in_chromium(page):
    """A reader opens the page, sees an answer, asks, moves the sliders and reads other figures; what is typed is no HTML; nothing is asked of any other machine."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--window-size=1300,1000'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', dict(performance='ALL', browser='ALL'))
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    found = lambda css: browser.find_elements(By.CSS_SELECTOR, css)
    wait = lambda condition: WebDriverWait(browser, 90).until(lambda _: condition())
    try:
        browser.get(page[1])
        wait(lambda: len(found('#figures figure')) == 2)
        wait(lambda: found('#question textarea, #question input'))
        assert len(found('#figures .stage')) == 4 and found('#figures .answer')[0].text and len(found('#figures .says')) > 8
        slider = found('#figures figure input')[0]  # of the figure: from the last pass to the first
        assert 'pass 2' in found('#figures .stage.now')[0].text
        slider.send_keys(Keys.ARROW_LEFT)
        assert 'pass 1' in found('#figures .stage.now')[0].text and 'pass 2' in found('#figures .stage.now')[1].text
        found('#figures .thumb')[1].click()
        assert 'pass 2' in found('#figures .stage.now')[0].text and slider.get_attribute('value') == '2'
        field = found('#question textarea, #question input')[0]
        field.send_keys(Keys.CONTROL, 'a')
        field.send_keys(SLY)
        found('#ask')[0].click()
        wait(lambda: SLY in found('#figures')[0].text)
        assert not found('#figures img[src=x]')
        passes = found('#passes input[type=number]')[0]  # of the page: more passes than in training
        passes.send_keys(Keys.CONTROL, 'a')
        passes.send_keys('5', Keys.TAB)
        wait(lambda: len(found('#figures .stage')) == 10)
        assert 'makes 5 passes and was trained with 2' in found('#figures')[0].text
        events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
        asked = [event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent']
        asked += [event['params']['url'] for event in events if event['method'] == 'Network.webSocketCreated']
        outside = [url for url in asked if not url.startswith((page[1], 'data:', 'blob:'))]
        assert len(asked) > 10 and not outside, outside
        assert not [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']
    finally:
        browser.quit()


@needs_gradio
def test_page_under_load(page, tmp_path):
    """Two people ask 200 times; then a picture of 60 megapixels, a text named .png, 10,000 signs: it stays up, with the memory it had. Ctrl-C ends it without a trace."""
    from gradio_client import Client, handle_file
    process, address = page
    Image.new('RGB', (10000, 6000), 'teal').save(tmp_path / 'huge.png')
    (tmp_path / 'text.png').write_text('hello')
    said = []

    def ask(source=demo.TEST, number=0, file=None, question='what color is the circle?', passes=3, prefix=16, client=None):
        return client.predict(source, number, file and handle_file(str(file)), question, passes, prefix, api_name='/answer')

    def person(n, first):
        client = Client(address, verbose=False)
        for k in range(n):
            said.append(ask(number=(first + k) % 20, passes=1 + k % 8, client=client))

    person(20, 0)  # warm
    before = memory(process)
    start = time.time()
    people = [threading.Thread(target=person, args=(100, k)) for k in (0, 10)]
    [one.start() for one in people]
    [one.join() for one in people]
    seconds = time.time() - start
    assert len(said) == 220 and all(text.count('<figure') == 2 for text in said)
    after = memory(process)
    client = Client(address, verbose=False)
    of_rounds = []
    for _ in range(5):
        assert ask(demo.FILE, file=tmp_path / 'huge.png', client=client).count('<figure') == 2
        assert 'not a picture' in ask(demo.FILE, file=tmp_path / 'text.png', client=client)
        assert 'has 10000 signs' in ask(question='x' * 10000, client=client)
        assert 'type a question' in ask(question='', client=client)
        of_rounds.append(memory(process))
    print(f'200 requests of two people in {seconds:.1f} s; memory {before:.0f} MB, then {after:.0f}, after bad input', *map(round, of_rounds))
    assert ask(client=client).count('<figure') == 2
    # a large picture takes memory, the next one takes it again
    assert after < before + 60 and of_rounds[-1] < of_rounds[0] + 60
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in out + err and 'stopped' in err
