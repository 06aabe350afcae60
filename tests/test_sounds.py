"""Sounds: files that are read or refused, spectra, rows with a sound, and the decoder that hears them."""

import io
import json
import random
import re
import struct
import sys
import wave
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.signal
import torch
from conftest import ROOT, without_torchvision
from PIL import Image

import data
import eval as evaluation
import train
from data import Questions, Tokenizer, read_rows, train_bpe
from encoder import SOUND_CONFIG, Encoder, encoder_of_run, load_encoder, save_encoder
from lab import demo, depths, passes, states
from model import ModelConfig, build_model
from plumbing.sounds import log_mel, open_sound, resampled, spectrum_picture
from plumbing.tables import write_dataset
from prepare import sounds
from prepare.shapes import balanced_choice


def tone(hertz=440, seconds=0.5, rate=8000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def wav(samples, rate=8000, width=2, channels=1):
    """A WAV file of samples from -1 to 1, the same in all channels."""
    whole = np.round(np.repeat(samples, channels) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = (whole + 128).astype(np.uint8) if width == 1 else whole.astype('<i8').view(np.uint8).reshape(-1, 8)[:, :width]
    buffer = io.BytesIO()
    with wave.open(buffer, 'wb') as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize('width', [1, 2, 3, 4])
@pytest.mark.parametrize('rate, channels', [(8000, 1), (44100, 2), (192000, 6)])
def test_wav(width, rate, channels):
    """WAV files of every width and rate give their samples back, mixed down."""
    samples, found = open_sound(wav(tone(rate=rate), rate, width, channels))
    assert found == rate and np.abs(samples - tone(rate=rate)).max() < 1.5 * 2 ** (1 - 8 * width) + 1e-6


def with_header(rate=8000, channels=1, bits=16, n_bytes=None, format=1, data=bytes(4000)):
    """A WAV file whose header says what it likes."""
    block = channels * bits // 8
    fmt = struct.pack('<HHIIHH', format, channels, rate, rate * block % 2**32, block % 2**16, bits)
    return b'RIFF' + struct.pack('<I', 36 + len(data)) + b'WAVEfmt ' + struct.pack('<I', 16) + fmt + b'data' + \
        struct.pack('<I', len(data) if n_bytes is None else n_bytes) + data


@pytest.mark.parametrize('data, problem', [
    (b'', 'not a sound: of no known format: expected WAV'), (b'<!doctype html><html>', 'not a sound: it is a web page'), (b'RIFF', 'not a sound that can be decoded'),
    (with_header(data=b''), 'a sound without samples'), (with_header(n_bytes=2**32 - 1), 'a sound that is cut off: 2000 of 2147483647|more than 60 seconds'),
    (with_header(n_bytes=8000), 'a sound that is cut off: 2000 of 4000 samples are there'), (with_header(channels=300), 'a sound of 300 channels: expected 1 to 32'),
    (with_header(rate=7999), 'a sound of 7999 samples a second: expected 8000 to 192000'), (with_header(rate=192001), '192001 samples'), (with_header(rate=0), 'a sound of 0 samples'),
    (with_header(channels=0), 'not a sound that can be decoded: bad # of channels'), (with_header(bits=64, data=bytes(64)), 'a sound of 64 bits'),
    (with_header(data=bytes(2 * 8000 * 61)), 'a sound of more than 60 seconds: 61'), (b'RIFF' + bytes(2**25), 'more than 33554432 bytes')])
def test_refused(data, problem):
    """What cannot be used is refused with a sentence."""
    with pytest.raises(ValueError, match=problem):
        open_sound(data)


def test_any_bytes():
    """Whatever a file's bytes are, it is read or refused with a ValueError."""
    good = [wav(tone(seconds=0.02), width=width, channels=channels) for width in (1, 2, 3, 4) for channels in (1, 2)]
    rng = random.Random(0)
    for k in range(3000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(60 if rng.random() < .9 else len(data))] = rng.randrange(256)
        data = bytes(data[:rng.randrange(len(data))] if k % 4 == 0 else data)
        try:
            samples, rate = open_sound(data)
        except ValueError:
            continue
        assert samples.ndim == 1 and len(samples) and np.abs(samples).max() <= 1.001 and 8000 <= rate <= 192000


def test_soundfile(monkeypatch):
    """Other kinds are read by soundfile; without it a hint says so."""
    soundfile = pytest.importorskip('soundfile')
    for format, subtype in (('FLAC', 'PCM_16'), ('WAV', 'FLOAT'), ('OGG', 'VORBIS')):
        buffer = io.BytesIO()
        soundfile.write(buffer, tone(), 8000, format=format, subtype=subtype)
        samples, rate = open_sound(buffer.getvalue())
        assert rate == 8000 and np.abs(samples - tone()).max() < (.1 if format == 'OGG' else 1e-4), format
        with pytest.raises(ValueError):
            open_sound(buffer.getvalue()[:60])
        with monkeypatch.context() as m, pytest.raises(ValueError, match='pip install soundfile'):
            m.setitem(sys.modules, 'soundfile', None)
            open_sound(buffer.getvalue())
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0, np.nan, 0]), 8000, format='WAV', subtype='FLOAT')
    with pytest.raises(ValueError, match='no finite numbers'):
        open_sound(buffer.getvalue())


@pytest.mark.parametrize('rate', [8000, 11025, 12347, 16000, 44100, 192000])
def test_resampled(rate):
    """As scipy does it: a tone stays itself, and one that is too high for the new rate is gone."""
    samples = np.random.default_rng(0).standard_normal(rate // 4)
    ours = resampled(samples, rate, 16000)
    assert np.abs(ours - scipy.signal.resample(samples, len(ours))).max() < 1e-10
    same = resampled(tone(440, 1, rate), rate, 16000)
    assert len(same) == 16000 and np.abs(same - tone(440, 1, 16000))[200:-200].max() < 5e-3
    if rate > 24000:
        assert np.abs(resampled(tone(11000, rate=rate), rate, 16000))[200:-200].max() < 5e-3


@pytest.mark.parametrize('bands', [64, 80, 128])
def test_log_mel(bands):
    """The spectrogram equals Whisper's in transformers."""
    with without_torchvision():
        from transformers import WhisperFeatureExtractor
    samples = np.random.default_rng(0).standard_normal(30 * 16000).astype(np.float32) * np.linspace(0, .3, 30 * 16000, dtype=np.float32)
    theirs = WhisperFeatureExtractor(feature_size=bands)(samples, sampling_rate=16000, return_tensors='np')['input_features'][0]
    ours = log_mel(samples, bands)
    assert ours.shape == theirs.shape == (bands, 3000) and np.abs(ours - theirs).max() < 1e-4


def test_spectrum_picture():
    """High is up, later is right, silence is black, and a short sound is not stretched."""
    picture = np.array(spectrum_picture(wav(np.concatenate([tone(300), tone(3000)]))))
    assert picture.shape == (64, 256) and picture.max() == 255 and (picture[:, 110:] == 0).all()
    low, high = picture[:, 25].argmax(), picture[:, 75].argmax()
    assert low > 50 and high < 32
    assert np.array(spectrum_picture(wav(np.zeros(100)))).max() == 0
    assert spectrum_picture(wav(tone(seconds=5))).size == (500, 64)


# ----------------------------------------------------------------------------
# rows


def png(color='red'):
    buffer = io.BytesIO()
    Image.new('RGB', (64, 64), color).save(buffer, 'PNG')
    return buffer.getvalue()


def write_folder(folder, **columns):
    folder.mkdir()
    for split in ('train', 'val', 'test'):
        pq.write_table(pa.table(columns), folder / f'{split}.parquet')
    return folder


def test_rows(tmp_path):
    """A row has a picture, a sound or both; each different one is known once, and a batch has rows of one kind."""
    beep, other = wav(tone()), wav(tone(900))
    (tmp_path / 'beep.wav').write_bytes(beep)
    folder = write_folder(tmp_path / 'set', image=[png(), None, png(), None, None], sound=[None, beep, beep, other, beep], question=['a?', 'b?', 'c?', 'd?', None],
                          answer=['x', 'y', 'z', 'w', None], caption=[None] * 4 + ['a beep'])
    rows = read_rows(folder, 'train')
    assert list(rows.picture) == [0, -1, 0, -1, -1] and list(rows.sound) == [-1, 0, 0, 1, 0] and list(rows.sounds) == [beep, other] and list(rows.pictures) == [png()]
    assert rows.question[4] in data.SOUND_PROMPTS and rows.type[4] == 'describe'
    questions = Questions(rows, Tokenizer(train_bpe(['a?'], 300)))
    kinds = [(batch['picture'].sign().tolist(), batch['sound'].sign().tolist()) for batch in map(questions.batch, questions.epoch(8, 0, 0))]
    assert all(len({*pictures}) == 1 or -1 not in pictures for pictures, _ in kinds) and all(len({*of}) == 1 or -1 not in of for _, of in kinds)
    assert sorted(i for batch in questions.epoch(8, 0, 0) for i in batch) == [0, 1, 2, 3, 4]
    paths = write_folder(tmp_path / 'paths', sound=['../beep.wav', 'none.wav'], question=['a?', 'b?'], answer=['x', 'y'])
    with pytest.raises(ValueError, match="row 0: the sound path '../beep.wav' leaves the folder.*row 1: there is no sound file"):
        read_rows(paths, 'train')


def test_import(tmp_path):
    """Sounds are checked at import; what cannot be used is a rejected row with its reason."""
    source = tmp_path / 'source'
    source.mkdir()
    good = [source / f'{k}.wav' for k in range(40)]
    for k, path in enumerate(good):
        path.write_bytes(wav(tone(200 + 10 * k)))
    (source / 'bad.wav').write_bytes(with_header(channels=300))
    (source / 'p.png').write_bytes(png())
    lines = [dict(sound=path.name, question='what?', answer='beep') for path in good] + [dict(sound='bad.wav', question='q', answer='a'), dict(question='q', answer='a'),
             dict(sound='0.wav', image='p.png', question='q', answer='a'), dict(image='p.png', question='q', answer='a'), dict(sound='gone.wav', question='q', answer='a')]
    (source / 'rows.json').write_text(json.dumps(lines))
    data.main(['table', f'--source={source}', f'--out={tmp_path}/out', '--max_bad=0.1'])
    rejects = [json.loads(line)['reason'] for line in (tmp_path / 'out/rejects.jsonl').read_text().splitlines()]
    assert sorted(reason.split(':')[0] for reason in rejects) == ['a sound of 300 channels', 'the image is empty, and there is no sound', 'there is no sound file']
    assert any(reason == 'a sound of 300 channels: expected 1 to 32' for reason in rejects)
    rows = [read_rows(tmp_path / 'out', split) for split in ('train', 'val', 'test')]
    assert sum(map(len, rows)) == 42 and all(map(len, rows)) and sum(len(of.sounds) for of in rows) == 40
    digests = [set(of.sounds.digests) for of in rows]
    assert not any(a & b for a in digests for b in digests if a is not b)  # a sound stays in one split, a picture beside it goes there too


# ----------------------------------------------------------------------------
# the decoder


def hearing(**settings):
    torch.manual_seed(0)
    return build_model(ModelConfig(**dict(vocab_size=40, n_embd=32, n_head=2, vision_dim=8, sound_dim=6, use_sound=True) | settings)).double().eval()


def inputs():
    torch.manual_seed(1)
    question, answer = torch.randint(3, 40, (2, 5)), torch.randint(3, 40, (2, 4))
    question[1, 3:], answer[:, 0] = 0, 1
    return torch.randn(2, 3, 8).double(), torch.randn(2, 4, 6).double(), question, answer


@pytest.mark.parametrize('settings', [dict(kind='plain'), dict(), dict(recursion='add'), dict(prefix_lm=False), dict(norm='pre')])
def test_what_a_row_lacks(settings):
    """Picture and sound both matter; what rows lack changes nothing: the decoder then is the one without it."""
    decoder = hearing(**settings)
    vision, sound, question, answer = inputs()
    logits, loss = decoder(vision, question, answer, answer.roll(-1, 1), sound=sound)
    assert logits.shape == (2, 4, 40) and loss > 0
    for other in (dict(vision=None, sound=sound), dict(vision=vision, sound=None), dict(vision=vision, sound=sound.flip(1))):
        assert not torch.allclose(decoder(other['vision'], question, answer, sound=other['sound'])[0], logits, atol=1e-6)
    for use, given in (dict(use_sound=False), dict(vision=vision, sound=None)), (dict(use_vision=False), dict(vision=None, sound=sound)):
        control = hearing(**settings | use)
        control.load_state_dict(decoder.state_dict(), strict=False)
        without = decoder(given['vision'], question, answer, sound=given['sound'])[0]
        assert torch.equal(control(vision, question, answer, sound=sound)[0], without)  # blind, or deaf
    row = decoder(None, question[1:, :3], answer[1:], sound=sound[1:])[0]  # alone and without padding
    assert torch.allclose(decoder(None, question, answer, sound=sound)[0][1:], row, atol=1e-10)


@pytest.mark.parametrize('settings', [dict(kind='plain'), dict(), dict(recursion='add')])
def test_generation(settings):
    """Cached generation with a sound gives the tokens of the uncached forward; the gradient reaches every sound token."""
    decoder = hearing(**settings)
    vision, sound, question, answer = inputs()
    written = decoder.generate(vision, question, 4, sound=sound)
    said = torch.cat([torch.ones_like(written[:, :1]), written[:, :-1]], 1)
    best = decoder(vision, question, said, sound=sound)[0].argmax(-1)
    assert torch.equal(written[written != 0], best[written != 0])
    sound.requires_grad_()
    decoder(vision, question, answer, answer.roll(-1, 1), sound=sound)[1].backward()
    assert (sound.grad.abs().sum(-1) > 0).all() and decoder.sound_proj.weight.grad.abs().max() > 0


def test_without_sound_nothing_changes():
    """A decoder that hears nothing has the weights that it always had, and an encoder of pictures its fingerprint."""
    decoder = hearing(use_sound=False)
    assert not hasattr(decoder, 'sound_proj') and 'sound_proj' not in decoder.parameter_counts()
    assert load_encoder('assets/encoder_shapes.pt').fingerprint() == json.loads((ROOT / 'results/runs/elastic_4.json').read_text())['encoder_fingerprint']


def test_shipped_encoder():
    """The shipped encoder of sounds is the one that docs/sounds.md names, is small, and tells melodies of one tone apart by pitch, length and instrument."""
    path = ROOT / 'assets/encoder_sounds.pt'
    e = encoder_of_run('sound_encoder', dict(sound_encoder=path))
    assert e.fingerprint() in (ROOT / 'docs/sounds.md').read_text() and path.stat().st_size < 1e6
    tokens = []
    for change in ({}, dict(hertz=1000), dict(seconds=0.4), dict(instrument='organ')):
        melody = [dict(instrument='flute', hertz=315, seconds=0.15) | change]
        tokens.append(e.encode_images(e.preprocess(spectrum_picture(sounds.sound_file(melody, random.Random(0))))[None]))
    assert min((a - b).norm() / a.norm() for a in tokens for b in tokens if a is not b) > .1


# ----------------------------------------------------------------------------
# the drawn task


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp('sounds') / 'drawn'
    write_dataset(out, ((split, row) for split, n in dict(train=12, val=2, test=2).items() for row in sounds.sound_rows(sounds.Config(), split, 0, n)), sounds.SCHEMA)
    return out


def test_balance():
    """Neither the picture, nor the melody, nor the question tells whether there are as many; each alone is at even odds."""
    rng = random.Random(0)
    answers = {}
    for _ in range(20000):
        pairs, n_tones, question, answer = sounds.draw_match(rng)
        group = question.removeprefix('are there as many tones as ').rstrip('?')
        n_objects = sum(group in (f'{color} objects', f'{shape}s', f'{shape}es') for color, shape in pairs)
        assert answer == ('yes' if n_tones == n_objects else 'no')
        for key in (('seen', n_objects), ('heard', n_tones), ('asked', group), ('heard', n_tones, group[-8:] == ' objects')):
            answers.setdefault(key, Counter())[answer] += 1
    assert all(abs(counts['yes'] / counts.total() - .5) < .05 for counts in answers.values()), answers


def test_choice():
    """A choice has the right answer, and needs both: who sees the picture alone has two colours at even odds, whatever is asked; who hears the tones alone has eight."""
    rng, given, first = random.Random(0), Counter(), {}
    for _ in range(1500):
        scene = [dict(color=color, shape=shape) for color, shape in sounds.draw_choice(rng)]
        melody = sounds.draw_melody(rng, rng.randint(1, 4))
        candidates = sounds.ask_choice(scene, melody)
        for _ in range(4):
            question, answer = both = balanced_choice(candidates, given, rng)
            candidates.remove(both)
            when, value, a, b = re.fullmatch(r'if the (\w+) tone is (\w+), what color is the (\w+), else the (\w+)\?', question).groups()
            tone = melody[dict(first=0, last=-1)[when]]
            right, other = (a, b) if value in (tone['pitch'], tone['length']) else (b, a)
            colors = {shape: [o['color'] for o in scene if o['shape'] == shape] for shape in (right, other)}
            assert colors[right] == [answer] and len(colors[other]) == 1 and colors[other] != [answer]
            first.setdefault((when, value), Counter())[right == a] += 1
    assert len(first) == 4 and all(abs(counts[True] / counts.total() - .5) < .05 for counts in first.values()), first
    assert len(given) == 8 and max(given.values()) / given.total() < .15


def test_questions():
    """What is asked about a melody and about both has the right answer."""
    melody = [dict(instrument='flute', pitch='low', length='long', hertz=250), dict(instrument='organ', pitch='high', length='short', hertz=800),
              dict(instrument='organ', pitch='low', length='short', hertz=400)]
    asked = dict(sounds.ask_tones(melody) + sounds.ask_highest(melody) + sounds.ask_plays(melody))
    assert asked['how many tones are there?'] == '3' and asked['how many organ tones are there?'] == '2' and asked['how many buzzer tones are there?'] == '0'
    assert asked['which tone is the highest?'] == 'second' and asked['which tone is the lowest?'] == 'first' and asked['what plays the last tone?'] == 'organ'
    asked = dict(sounds.ask_quality(melody))
    assert asked['is the first tone high?'] == 'no' and asked['is the second tone high?'] == 'yes' and asked['is the first tone long?'] == 'yes' and asked['is the last tone long?'] == 'no'
    assert sounds.ask_before(melody) == [] and dict(sounds.ask_before(melody[:2]))['does the organ play before the flute?'] == 'no'
    scene = [dict(shape='circle', color='red'), dict(shape='square', color='blue')]
    asked = dict(sounds.ask_choice(scene, melody))
    assert asked['if the first tone is high, what color is the circle, else the square?'] == 'blue' and asked['if the first tone is long, what color is the circle, else the square?'] == 'red'


def test_drawn(drawn):
    """The dataset has rows of all kinds; every sound is heard as it was written, within the time of a picture."""
    rows = read_rows(drawn, 'train')
    of_kind = Counter((rows.picture[i] >= 0, rows.sound[i] >= 0) for i in range(len(rows)))
    assert {*of_kind} == {(True, True), (True, False), (False, True)} and {'match', 'choice', 'tones', 'highest', 'plays', 'color'} <= {*rows.type}
    assert all(rows.picture[i] >= 0 and rows.sound[i] >= 0 for i in range(len(rows)) if rows.type[i] in ('match', 'choice'))
    assert all(spectrum_picture(sound).size == (256, 64) for sound in rows.sounds)
    again = [row for row in sounds.sound_rows(sounds.Config(), 'train', 0, 2)]
    assert again == [row for row in sounds.sound_rows(sounds.Config(), 'train', 0, 2)] and sounds.contact_sheet(sounds.Config()).width > 400
    with pytest.raises(ValueError, match='alone=2'):
        sounds.Config(alone=2)


SMALL = ['--sound_encoder=None', '--max_steps=4', '--eval_interval=2', '--batch_size=16', '--n_embd=32', '--n_head=2', '--vocab_size=400', '--max_question_tokens=48', '--max_answer_tokens=8', '--device=cpu', '--log_interval=1']


def test_run(drawn, tiny_encoder, tmp_path, capsys, monkeypatch):
    """A run with sounds trains their encoder, is judged, goes on to the same bits, and answers about files."""
    argv = [str(ROOT / 'config/sounds.py'), *SMALL, f'--dataset={drawn}', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache']
    train.main([*argv, f'--out_dir={tmp_path}/run'])
    metrics = json.loads((tmp_path / 'run/metrics.json').read_text())
    assert metrics['parameters']['sound_encoder'] > 1e5 and metrics['parameters']['sound_proj'] and 'match' in metrics['by_type'] and metrics['mflop_per_example'] > 0
    save = train.save

    def stopped(out_dir, checkpoint, run, parts):
        save(out_dir, checkpoint, run, parts)
        if run.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, 'save', stopped)
        train.main([*argv, f'--out_dir={tmp_path}/half'])
    train.main([*argv, f'--out_dir={tmp_path}/half'])
    ends = [torch.load(tmp_path / f'{name}/ckpt.pt', weights_only=True)['state']['model'] for name in ('run', 'half')]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(t, ends[1][key]) for key, t in ends[0].items())
    torch.manual_seed(1337)
    start = Encoder(SOUND_CONFIG).state_dict()
    assert all((ends[0][f'sound_encoder.{key}'] != t).any() for key, t in start.items() if t.dim() > 1)
    rows = read_rows(drawn, 'test')
    (tmp_path / 'a.wav').write_bytes(rows.sounds[0])
    capsys.readouterr()
    evaluation.main([f'--out_dir={tmp_path}/run', f'--sound={tmp_path}/a.wav', '--question=how many tones are there?', '--device=cpu'])
    assert capsys.readouterr().out.count('\n') == 1
    evaluation.main([f'--out_dir={tmp_path}/run', '--device=cpu', '--wrong_pictures=true'])
    evaluation.main([f'--out_dir={tmp_path}/run', '--device=cpu'])
    assert json.loads((tmp_path / 'run/metrics.json').read_text())['correct'] == metrics['correct']
    capsys.readouterr()
    for program, flags in ((states, []), (passes, []), (depths, ['--passes=1,2', '--halts=0.3', '--most=64']), (demo, [f'--html={tmp_path}/page.html'])):
        program.main([f'--out_dir={tmp_path}/run', '--device=cpu', *flags])
    page = (tmp_path / 'page.html').read_text()
    assert re.search(r'\d+% at the picture<br>listens: \d+% at the sound', page) and re.search(r'\d+% at the picture</div>', page) and 'after pass 64' in capsys.readouterr().out
    (tmp_path / 'bad.wav').write_bytes(b'RIFF')
    with pytest.raises(ValueError, match='bad.wav: not a sound that can be decoded: EOFError'):
        evaluation.main([f'--out_dir={tmp_path}/run', f'--sound={tmp_path}/bad.wav', '--question=what?', '--device=cpu'])


def test_controls(drawn, tiny_encoder, tmp_path, capsys):
    """The deaf and the blind control are a flag each; a frozen encoder of sounds comes from a file, and is told from one of pictures."""
    argv = [str(ROOT / 'config/sounds.py'), *SMALL, '--max_steps=1', f'--dataset={drawn}', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache']
    train.main([*argv, '--use_sound=false', '--sound_encoder=none.pt', f'--out_dir={tmp_path}/deaf'])  # a file that is not asked for
    assert 'has sounds, which are not heard' in capsys.readouterr().out
    with pytest.raises(ValueError, match='hears nothing'):
        evaluation.main([f'--out_dir={tmp_path}/deaf', '--sound=a.wav', '--question=what?', '--device=cpu'])
    train.main([*argv, '--use_vision=false', f'--out_dir={tmp_path}/blind'])
    save_encoder(Encoder(SOUND_CONFIG), tmp_path / 'sound_encoder.pt')
    train.main([*argv, f'--sound_encoder={tmp_path}/sound_encoder.pt', f'--out_dir={tmp_path}/frozen'])
    assert 'sound_encoder' not in torch.load(tmp_path / 'frozen/ckpt.pt', weights_only=True)['run']['best']
    evaluation.main([f'--out_dir={tmp_path}/frozen', '--device=cpu'])
    save_encoder(Encoder(SOUND_CONFIG), tmp_path / 'sound_encoder.pt')
    with pytest.raises(ValueError, match='another fingerprint'):
        evaluation.main([f'--out_dir={tmp_path}/frozen', '--device=cpu'])
    with pytest.raises(ValueError, match='an encoder that reads a picture, expected one that reads a sound'):
        train.main([*argv, f'--sound_encoder={tiny_encoder}', f'--out_dir={tmp_path}/wrong'])
    with pytest.raises(ValueError, match='an encoder that reads a sound, expected one that reads a picture'):
        train.main([*argv[:-2], f'--encoder={tmp_path}/sound_encoder.pt', argv[-1], f'--out_dir={tmp_path}/wrong'])
    with pytest.raises(ValueError, match='trained its sound_encoder along; give --sound_encoder=None'):
        train.main([*argv, '--use_vision=false', f'--sound_encoder={tmp_path}/sound_encoder.pt', f'--init_from={tmp_path}/blind', f'--out_dir={tmp_path}/wrong'])
    capsys.readouterr()
    train.main([*argv, f'--sound_encoder={tmp_path}/sound_encoder.pt', f'--init_from={tmp_path}/frozen', f'--out_dir={tmp_path}/again'])
    assert 'its tokens came from another sound_encoder' in capsys.readouterr().out
    silent = write_folder(tmp_path / 'silent', image=[png()], question=['a?'], answer=['x'])
    with pytest.raises(ValueError, match='no training row has a sound'):
        train.main([*argv, f'--dataset={silent}', f'--out_dir={tmp_path}/wrong'])
