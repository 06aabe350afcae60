"""align/: what stage 1 trains, on what, how it is judged, and its program."""

import io
import json
import math
import random
import re
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_runs import torchrun

import train
from align import __main__ as align_main
from align import judge
from align.captions import (
    AlignData,
    Captions,
    DrawnCaptions,
    DrawnSounds,
    cloze,
)
from align.config import AlignConfig
from align.model import AlignModel, build, start_from
from data import Tokenizer, read_rows, train_bpe
from encoder import SOUND_CONFIG, Encoder, EncoderConfig, encoder_of_run, load_encoder, save_encoder
from plumbing.console import run_script
from plumbing.pictures import as_seen
from plumbing.run import read_checkpoint
from plumbing.sounds import spectrum_picture
from prepare import shapes, sounds
from prepare.shapes import Config as ShapesConfig

SMALL = ['--encoder_width=32', '--encoder_layers=1', '--encoder_dim=16', '--n_latents=4', '--device=cpu']


def weights(out_dir):
    return read_checkpoint(out_dir)['state']['model']


def small(**settings):
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**dict(width=32, n_layer=1, vision_dim=16, prefixes=(4, 8, 16)) | settings)).eval()


def png(color=(9, 9, 9), size=(8, 8)):
    buffer = io.BytesIO()
    Image.new('RGB', size, color).save(buffer, 'PNG')
    return buffer.getvalue()


def align_batch(B=16, V=30):
    g = torch.Generator().manual_seed(0)
    caption = torch.randint(0, V, (B, 2, 5), generator=g)
    caption[:, 1, 3:] = -100
    return torch.randn(B, 3, 64, 64, generator=g), caption, (torch.rand(B, 2, 5, generator=g) < .5) & (caption >= 0)


@pytest.mark.parametrize('adapter', ['none', 'linear', 'mlp'])
def test_alignment_losses(adapter):
    """Both losses start at chance, and together they reach every weight of the encoder and of what reads the captions."""
    model = AlignModel(small(adapter=adapter), 30)
    images, *captions = align_batch()
    losses = model(model.encoder(images), *captions)
    assert abs(losses['contrast'].item() - math.log(16)) < .7 and abs(losses['cloze'].item() - math.log(30)) < .7
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_alignment_learns():
    """A few steps on one batch bring the contrast and the cloze far below chance, at every Matryoshka prefix."""
    torch.manual_seed(0)
    model = AlignModel(small(), 30, width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, caption, left_out = align_batch()
    for _ in range(120):
        losses = model(model.encoder(images), caption, left_out)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert losses['contrast'] < 1 and losses['cloze'] < 1.5
    pooled, text = model.encoder(images).mean(1), model.read_text(caption.masked_fill(left_out, 30))[1]  # as trained
    for d in model.encoder.config.prefixes:
        sims = torch.nn.functional.normalize(pooled[:, :d], dim=1) @ torch.nn.functional.normalize(text[:, :d], dim=1).T
        assert (sims.argmax(1) == torch.arange(16)).float().mean() > .3  # chance: .06


def of_rank(rank, folder, pooled, text, data):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.save((contrast_of_rank(rank, pooled, text), judge_all(data)), f'{folder}/{rank}')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """-> the whole batch of a contrast, a dataset, and what each of two processes makes of its part of them."""
    torch.manual_seed(0)
    pooled, text = torch.randn(2, 8, 16, dtype=torch.float64)
    folder = tmp_path_factory.mktemp('two')
    data = captioned(folder / 'data', dict(train=texts(20), val=texts(20), test=texts(20)))
    torch.multiprocessing.spawn(of_rank, (folder, pooled, text, data), nprocs=2)
    return pooled, text, data, [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


def contrast_of_rank(rank, pooled, text):
    model = AlignModel(small(), 30).double()
    mine = slice(4 * rank, 4 * rank + 4)
    a, b = pooled[mine].clone().requires_grad_(), text[mine].clone().requires_grad_()
    loss = model.contrast(a, b)
    loss.backward()
    return loss.item(), a.grad / 2, b.grad / 2, model.log_scale.grad  # DDP takes the mean over the processes


def test_contrast_sees_all_processes(two_processes):
    """Two processes with half a batch each get the contrast and the gradients of one process with the whole batch."""
    pooled, text, _, results = two_processes
    pooled, text = pooled.clone().requires_grad_(), text.clone().requires_grad_()
    model = AlignModel(small(), 30).double()
    loss = model.contrast(pooled, text)
    loss.backward()
    for rank, ((theirs, a, b, scale), _) in enumerate(results):
        mine = slice(4 * rank, 4 * rank + 4)
        assert abs(theirs - loss.item()) < 1e-6 and torch.allclose(a, pooled.grad[mine], atol=1e-7) and torch.allclose(b, text.grad[mine], atol=1e-7)
        assert torch.allclose(scale, model.log_scale.grad, atol=1e-6)


def test_padding_of_phrases():
    """Padding in a phrase changes nothing, and is never left out as if it were a word."""
    model = AlignModel(small(), 30).double()
    caption, left_out = cloze([[1, 2, 3], [4], [5, 6], [7, 8, 9]], 2, random.Random(0)).values()
    assert left_out.any() and not left_out[caption < 0].any()
    more, tokens = torch.nn.functional.pad(caption, (0, 20), value=-100), torch.randn(2, 5, 16, dtype=torch.float64)
    a, b = model(tokens, caption, left_out), model(tokens, more, torch.nn.functional.pad(left_out, (0, 20)))
    assert all(torch.allclose(a[key], b[key], atol=1e-12) for key in ('contrast', 'cloze'))


def test_cloze_asks_for_a_word():
    """However few and short the captions are, a word is left out: a loss over none would be no number."""
    assert all(cloze([[1]], 1, random.Random(seed))['left_out'].any() for seed in range(9))


def test_contrast_is_infonce():
    """The contrast is the mean over the prefixes, the first so many dimensions, of symmetric InfoNCE with a learned scale, 100 at most."""
    model = AlignModel(small(), 30).double()
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 16, dtype=torch.float64)
    for scale in (10., 1000.):
        model.log_scale.data.fill_(np.log(scale))
        expected = 0
        for d in (4, 8, 16):
            p = (min(scale, 100) * torch.nn.functional.cosine_similarity(a[:, None, :d], b[None, :, :d], dim=-1))
            expected += -(p.log_softmax(0).diagonal() + p.log_softmax(1).diagonal()).mean() / 2 / 3
        assert model.contrast(a, b).item() == pytest.approx(expected.item(), rel=1e-5)


def test_cloze_does_not_see_its_answers():
    """A word that is left out does not reach the loss but as what is to be found; what is there, and the picture, do."""
    torch.manual_seed(0)
    model = AlignModel(small(), 30).double()
    tokens, caption, left_out = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True), torch.randint(30, (2, 2, 5)), torch.rand(2, 2, 5) < .5
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    for change in (torch.zeros_like(left_out), left_out, ~left_out):
        losses = model(tokens, (caption + change) % 30, left_out)
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2])
    assert torch.autograd.grad(losses['cloze'], tokens)[0].abs().amax(2).min() > 0


def test_retrieval():
    """Perfect embeddings find each other, random ones do at chance; a prefix is judged on its own dimensions. Embeddings that are all alike, or no numbers, find
    nothing, and of pictures that are alike none is the right one for sure."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 8, generator=g), torch.randn(50, 8, generator=g)
    assert judge.retrieval(a, a, [8])[8]['R@1'] == 1
    mixed = torch.cat([a[:, :4], b[:, :4]], dim=1)
    result = judge.retrieval(a, mixed, [4, 8])
    assert result[4]['R@1'] == 1 > result[8]['R@1']
    assert judge.retrieval(a, b, [8])[8]['R@5'] < .3
    nan = torch.full((50, 8), torch.nan)
    assert judge.retrieval(a, nan, [8])[8] == {'R@1': 0, 'R@5': 0, 'R@10': 0, 'median rank': 50}
    for alike in (torch.ones(50, 8), nan):
        assert judge.retrieval(alike, alike, [8])[8]['R@10'] == 0
    twice = torch.cat([a, a[:10]])
    assert judge.retrieval(twice, twice, [8])[8]['R@1'] == pytest.approx(40 / 60) and judge.retrieval(twice, twice, [8])[8]['R@5'] == 1


def test_probe_reads_perfect_tokens():
    """On tokens that hold the scene itself the probe is nearly perfect; on noise it is not: it measures the tokens."""
    from prepare.shapes import COLORS, SHAPES

    class Oracle:
        def __init__(self, noise):
            self.noise, self.scenes = noise, []

        def normalise(self, pixels):
            return pixels

        def encode_images(self, pixels):
            tokens = torch.zeros(len(pixels), 6, 34)
            for i, scene in enumerate(self.scenes):
                for k, o in enumerate(scene):
                    tokens[i, k, list(COLORS).index(o['color']) * 4 + list(SHAPES).index(o['shape'])] = 1
                    tokens[i, k, 32:] = torch.tensor([o['x'], o['y']]) / 32 - 1
            return torch.randn(tokens.shape) if self.noise else tokens

    class Drawn(DrawnCaptions):
        def scenes(self, *args, **kwargs):
            result = super().scenes(*args, **kwargs)
            oracle.scenes = result[0]
            return result

    results = []
    for noise in (False, True):
        oracle = Oracle(noise)
        results.append(judge.probe(oracle, Drawn(ShapesConfig(), None), 'cpu', n_train=1000, n_test=250, steps=200))
    assert results[0]['pair_f1'] > .97 and results[0]['place_error_px'] < 4
    assert results[1]['pair_f1'] < .5 and results[1]['place_error_px'] > 10


def test_drawn_captions():
    """Alignment batches are a pure function of (split, step, seed); phrases name size, colour, shape and the right place."""
    config = ShapesConfig()
    drawn = DrawnCaptions(config)
    drawn.tokenizer = Tokenizer(train_bpe(drawn.sample(300), 512))
    a, b, c = drawn.batch('train', 3, 4, 0), drawn.batch('train', 3, 4, 0), drawn.batch('val', 3, 4, 0)
    assert all(torch.equal(a[k], b[k]) for k in ('pixels', 'caption', 'left_out')) and not torch.equal(a['pixels'], c['pixels'])
    assert a['pixels'].shape == (4, 3, 64, 64) and a['pixels'].dtype == torch.uint8 and a['caption'].shape[:2] == (4, 4)
    scene = [dict(size='big', color='red', shape='circle', x=18.0, y=47.0, r=7.5)]
    assert list(shapes.locate(scene, random.Random(0), 64)) == ['big red circle at e12'] * 4


def test_init_from(tiny_encoder, tmp_path):
    """An alignment starts from the weights of another encoder file of its sizes, and refuses those of other sizes."""
    other = load_encoder(tiny_encoder)
    encoder = Encoder(other.config)
    start_from(tiny_encoder, encoder)
    assert encoder.fingerprint() == other.fingerprint() != Encoder(other.config).fingerprint()
    with pytest.raises(ValueError, match='an encoder of other sizes'):
        start_from(tiny_encoder, Encoder(replace(other.config, perceiver_layers=other.config.perceiver_layers + 1)))
    with pytest.raises(ValueError, match='one of the two'):
        AlignConfig(init_from='a', trunk='b', captions='dataset')


def test_captions(tmp_path):
    """A batch has its pictures' own sentences, long ones cut without loss; an epoch shows every picture once, in another order each time; a batch is a function of
    (seed, step); pictures without a caption are named."""
    words = [f'w{k}' for k in range(9)]
    texts = [f'{w} is here. ' + ' '.join([w] * (2 + 40 * (k == 3))) + '! And so on.' for k, w in enumerate(words)]
    pq.write_table(pa.table(dict(image=[png((k, 0, 0)) for k in range(9)], caption=texts)), tmp_path / 'train.parquet')
    rows = read_rows(tmp_path, 'train')
    t = Tokenizer(train_bpe(texts, 300))
    captions = Captions(rows, t, n_phrases=4, most_tokens=8)
    for k, text in enumerate(texts):
        assert max(map(len, captions.phrases[k])) <= 8 and t.bpe.decode(sum((p.tolist() for p in captions.phrases[k]), [])).replace(' ', '') == text.replace(' ', '')
    orders = []
    for step in range(6):
        batch = captions.batch(step, 3, seed=1)
        assert batch['caption'].shape[:2] == (3, 4) and all(torch.equal(batch[key], captions.batch(step, 3, seed=1)[key]) for key in ('picture', 'caption', 'left_out'))
        for i, phrases in zip(batch['picture'].tolist(), batch['caption']):
            said = [t.bpe.decode(p[p >= 0].tolist()) for p in phrases]
            own = [t.bpe.decode(p.tolist()) for p in captions.phrases[i]]
            assert set(said) <= set(own) and (i == 3 or len(set(said)) == 3) and not any(w in ' '.join(said) for w in words if w != words[i])
        orders += batch['picture'].tolist()
    assert sorted(orders[:9]) == sorted(orders[9:]) == list(range(9)) and orders[:9] != orders[9:]
    with pytest.raises(ValueError, match='batch_size=10: more than the 9 pictures'):
        captions.batch(0, 10, seed=1)
    pq.write_table(pa.table(dict(image=[png((1, 0, 0)), png((2, 0, 0))], question=['q', 'q'], answer=['a', 'a'], caption=['c', ' '])), tmp_path / 'train.parquet')
    with pytest.raises(ValueError, match='1 of 2 pictures have no caption.*row 1'):
        Captions(read_rows(tmp_path, 'train'), t)


def test_drawn_captions_are_of_their_picture():
    """Each phrase names an object of its own scene."""
    config = shapes.Config()
    drawn = DrawnCaptions(config)
    drawn.tokenizer = t = Tokenizer(train_bpe(drawn.sample(300), 512))
    batch, (scenes, pixels, _) = drawn.batch('train', 3, 6, 0), drawn.scenes('train', 3, 6, 0)
    assert torch.equal(batch['pixels'], pixels)
    for scene, phrases in zip(scenes, batch['caption']):
        there = {f"{o['size']} {o['color']} {o['shape']}" for o in scene}
        assert {t.bpe.decode(p[p >= 0].tolist()).split(' at ')[0] for p in phrases} <= there


def true_of(melody, phrase):
    """Whether a phrase is true of a melody, looked up by other means than it was made."""
    words, order = phrase.split(), dict(first=0, second=1, third=2, fourth=3, last=len(melody) - 1)
    if words[1] == 'tone' and words[0] in order:
        tone = dict(enumerate(melody)).get(order[words[0]])
        if words[-1] == 'hertz':
            return tone and words[2:] == [str(tone['hertz']), 'hertz']
        return tone and words[2:] == [tone['pitch'], tone['length'], tone['instrument']] and (tone['pitch'] == 'high') == (tone['hertz'] > 600)
    if words[0] in ('highest', 'lowest'):
        ranked = sorted(melody, key=lambda tone: tone['hertz'], reverse=words[0] == 'highest')
        return melody.index(ranked[0]) == order[words[2]]
    return int(words[0]) == sum(all(word in tone.values() for word in words[1:-1]) for tone in melody) and words[-1] == 'tones'


def test_drawn_sounds():
    """Phrases are true of their melody, and of other melodies mostly not; batches are a pure function of (seed, split, step), and the pictures are those that an encoder
    of sounds makes of the files."""
    config = sounds.Config()
    drawn = DrawnSounds(config)
    drawn.tokenizer = t = Tokenizer(train_bpe(drawn.sample(300), 512))
    batch, (melodies, pixels, _) = drawn.batch('train', 3, 6, 0), drawn.scenes('train', 3, 6, 0)
    assert torch.equal(batch['pixels'], pixels) and pixels.shape == (6, 3, 64, 64) and batch['caption'].shape[:2] == (6, 10)
    again = DrawnSounds(config, t)
    assert all(torch.equal(batch[key], again.batch('train', 3, 6, 0)[key]) for key in ('pixels', 'caption', 'left_out'))
    assert not torch.equal(pixels, again.scenes('val', 3, 6, 0)[1]) and not torch.equal(pixels, again.scenes('train', 3, 6, 1)[1])
    said = [[t.bpe.decode(p[p >= 0].tolist()) for p in phrases] for phrases in batch['caption']]
    for melody, phrases in zip(melodies, said):
        assert all(true_of(melody, phrase) for phrase in phrases), (melody, phrases)
        assert sum(all(true_of(melody, phrase) for phrase in others) for others in said) < 3
    rng, melody = random.Random(0), melodies[0]
    heard = as_seen(spectrum_picture(sounds.sound_file(melody, rng)))
    assert torch.equal(Encoder(SOUND_CONFIG).pixels(heard), torch.from_numpy(drawn.square(heard)).permute(2, 0, 1))


def test_sound_probe():
    """On tokens that say what each tone is the probe is nearly perfect, on noise it is at chance: it measures the tokens."""
    tone = torch.zeros(1500, judge.PLACES, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    for row, n in zip(tone, torch.randint(1, 5, (1500,), generator=g).tolist()):
        row[:n] = torch.randint(1, 37, (n,), generator=g)
        row[-1] = row[n - 1]
    place = torch.eye(judge.PLACES).expand(1500, -1, -1)
    tokens = torch.cat([place, torch.nn.functional.one_hot(tone, 37).float()], 2)
    results = []
    for of in (tokens, torch.randn(tokens.shape, generator=g)):
        results.append(judge.train_sound_probe((of[:1250], tone[:1250]), (of[1250:], tone[1250:]), 100))
    assert min(results[0].values()) > .95 and results[1]['number'] < .45 and results[1]['instrument'] < .5


def killed_and_resumed(argv, last, monkeypatch):
    """A run that dies at the beginning of a step, and then the same command again."""
    class Killed(BaseException):
        pass

    def killed(step, s, rate=align_main.learning_rate):
        if step == last:
            raise Killed
        return rate(step, s)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(align_main, 'learning_rate', killed)
        align_main.main(argv)
    align_main.main(argv)


def test_align_sounds(tmp_path, capsys, monkeypatch):
    """config/align_sounds.py trains an encoder of sounds, whose file stage 2 takes as one; a stopped run ends with the same bits."""
    monkeypatch.setattr(judge.validate, '__defaults__', (250,))
    monkeypatch.setattr(judge.report, '__defaults__', (250,))
    monkeypatch.setattr(judge.probe_sounds, '__defaults__', (250, 250, 2))
    argv = [str(ROOT / 'config/align_sounds.py'), '--eval_interval=2', '--batch_size=4', '--encoder_width=32', '--encoder_dim=16', '--n_latents=0', '--device=cpu']
    out = tmp_path / 'run'
    align_main.main([*argv, '--max_steps=4', f'--out_dir={out}'])
    encoder = encoder_of_run('sound_encoder', dict(sound_encoder=out / 'encoder.pt'))
    assert encoder.config.reads == 'sound' and encoder.config.vision_dim == 16 and encoder.config.mean == SOUND_CONFIG.mean
    metrics = json.loads((out / 'metrics.json').read_text())
    assert metrics['probe'].keys() == {'number', 'instrument', 'pitch', 'length', 'exact_melody'} and 'probe | number' in capsys.readouterr().out
    judge.main([f'--out_dir={out}', '--device=cpu'])
    killed_and_resumed([*argv, '--max_steps=4', f'--out_dir={tmp_path}/half'], 3, monkeypatch)
    a, b = weights(out), weights(tmp_path / 'half')
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_align_stage(tmp_path, capsys, monkeypatch):
    """config/align.py trains an encoder on drawn captions, reports retrieval per prefix and the probe, and its file then serves
    stage 2."""
    monkeypatch.setattr(judge, 'probe', lambda *args: dict(pair_f1=0., exact_scene=0., place_error_px=0.))
    monkeypatch.setattr(judge.validate, '__defaults__', (250,))
    monkeypatch.setattr(judge.report, '__defaults__', (250,))
    out = tmp_path / 'align'
    align_main.main([str(ROOT / 'config/align.py'), '--max_steps=4', '--eval_interval=2', '--log_interval=2', '--batch_size=4',
                '--encoder_width=32', '--encoder_layers=1', '--encoder_dim=16', '--n_latents=4', '--max_objects=4',
                '--image_px=64', f'--out_dir={out}'])
    metrics = json.loads((out / 'metrics.json').read_text())
    assert list(metrics['retrieval']) == ['2', '4', '8', '16'] and 'probe' in metrics
    assert load_encoder(out / 'encoder.pt').config.vision_dim == 16
    capsys.readouterr()
    judge.main([f'--out_dir={out}', '--device=cpu'])
    text = capsys.readouterr().out
    assert 'retrieval among 250 pictures' in text and 'median rank' in text and 'probe' in text
    judge.main([f'--out_dir={out}', '--device=cpu', '--split=train'])
    import eval as evaluation
    with pytest.raises(ValueError, match='has no decoder'):
        evaluation.main([f'--out_dir={out}', '--device=cpu', f'--image={ROOT}/assets/passes.png', '--question=what?', '--inner_steps=2'])


@pytest.mark.parametrize('objective, left, optimizer', [('contrast', 'reader', 'muon'), ('cloze', 'text_projection', 'adamw'), ('cloze', 'text_projection', 'muon')])
def test_align_objective(objective, left, optimizer, tmp_path, monkeypatch):
    """Stage 1 learns from one of its losses alone: what only the other one reads stays as it was, whatever the optimizer, and the encoder moves."""
    models = []
    monkeypatch.setattr(align_main, 'finish', lambda model, *args: models.append(model))
    monkeypatch.setattr(align_main, 'validate', lambda *args: {'loss': 1., 'R@1': 0.})
    for steps in (1, 3):
        align_main.main([str(ROOT / 'config/align.py'), f'--max_steps={steps}', '--batch_size=4', '--encoder_width=32', '--encoder_layers=1', '--encoder_dim=16', '--n_latents=4',
                    f'--optimizer={optimizer}', '--warmup_ratio=0', '--min_lr_ratio=0.5', f'--objective={objective}', f'--out_dir={tmp_path}/{steps}'])
    one, three = (dict(model.named_parameters()) for model in models)
    moved = {key for key in one if not torch.equal(one[key], three[key])}
    assert any(key.startswith('encoder.trunk') for key in moved) and {key for key in one if key.startswith(left)} and not any(key.startswith(left) for key in moved)
    assert align_main.chosen(AlignConfig(objective=objective), dict(contrast=1, cloze=2)).keys() == {objective}


@pytest.mark.parametrize('option', ['--perceiver_layers=1', '--perceiver_heads=2', '--adapter=linear --perceiver_width=16', '--text_layers=2', '--text_width=64', '--adapter=mlp', '--pool=2',
                                    '--max_objects=3', '--prefixes=4,16'])
def test_align_settings_matter(option, tmp_path, monkeypatch):
    """Every one of these settings changes what stage 1 trains, or what it is trained on."""
    monkeypatch.setattr(align_main, 'finish', lambda *args: None)
    monkeypatch.setattr(align_main, 'validate', lambda *args: {'loss': 1., 'R@1': 0.})
    ends = []
    for flag in (option.split()[:-1], option.split()):
        out = tmp_path / str(len(ends))
        align_main.main([str(ROOT / 'config/align.py'), '--max_steps=2', '--warmup_ratio=0', '--batch_size=4', '--encoder_width=32', '--encoder_layers=1', '--encoder_dim=16', '--n_latents=4',
                    *flag, f'--out_dir={out}'])
        ends.append(weights(out))
    a, b = ends
    assert a.keys() != b.keys() or any(a[k].shape != b[k].shape or not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('rate, warned', [(1e-9, True), (3e-3, False)])
def test_a_loss_at_chance_is_said(rate, warned, tmp_path, capsys, monkeypatch):
    """A run whose contrast has not fallen below that of a guess after a hundred steps says so, once; one that learns does not."""
    monkeypatch.setattr(align_main, 'finish', lambda *args: None)
    monkeypatch.setattr(align_main, 'validate', lambda *args: {'loss': 1., 'R@1': 0.})
    align_main.main([str(ROOT / 'config/align.py'), '--max_steps=120', '--log_interval=20', '--eval_interval=120', '--batch_size=8', '--encoder_width=32',
                '--encoder_layers=1', '--encoder_dim=16', '--n_latents=4', f'--learning_rate={rate}', '--warmup_ratio=0.1', f'--out_dir={tmp_path}'])
    assert capsys.readouterr().out.count('nothing is learnt yet') == warned


GRADIENTS = '''
import os, sys, torch
from align import __main__ as align_main
all_reduce, out = align_main.all_reduce, []
def caught(parameters, values):
    means = all_reduce(parameters, values)
    out.append([means[:-1].clone()] + [p.grad.clone() for p in parameters if p.grad is not None])
    return means
align_main.all_reduce = caught
align_main.finish = lambda *args: None
align_main.validate = lambda *args: {'loss': 1., 'R@1': 0.}
align_main.main(sys.argv[1:])
if int(os.environ['RANK']) == 0:
    torch.save(out, 'gradients.pt')
'''


def test_gradients_of_two_processes(tmp_path):
    """Two processes give the gradients of one that has the whole batch, to 1e-6: the contrast sees the captions of both."""
    ends = []
    for n in (1, 2):
        done = torchrun(n, GRADIENTS, '--dtype=float32', '--seed=0', '--batch_size=8', '--max_steps=6', '--learning_rate=1e-30', '--variety=0', *SMALL, f'--out_dir={n}', cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ends.append(torch.load(tmp_path / 'gradients.pt', weights_only=True))
    for one, two in zip(*ends):
        assert len(one) == len(two) and all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(one, two))


def test_stopped_and_resumed(tmp_path, monkeypatch):
    """A run that is killed between checkpoints and started again ends with the same weights, to the bit."""
    monkeypatch.setattr(align_main, 'finish', lambda *args: None)
    monkeypatch.setattr(align_main, 'validate', lambda *args: {'loss': 1., 'R@1': 0.})
    run = ['--max_steps=6', '--eval_interval=2', '--batch_size=4', *SMALL]
    align_main.main([*run, f'--out_dir={tmp_path}/whole'])
    killed_and_resumed([*run, f'--out_dir={tmp_path}/killed'], 5, monkeypatch)
    a, b = weights(tmp_path / 'whole'), weights(tmp_path / 'killed')
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


MISTAKES = [
    ('config/align.py --text_width=130', 'text_width=130: expected a multiple of 4'),
    ('config/align.py --trunk={encoder}', 'trunk with captions=drawn'),
    ('config/align.py --encoder_px=32', 'encoder_px without a trunk'),
    ('config/align.py --prefixes=a', 'prefixes=a: expected numbers'),
    ('config/align_pixmo.py --dataset={data} --trunk={encoder}', 'an encoder with a resampler or a projection; expected CLIP alone'),
    ('config/align.py --n_layer=3', 'n_layer: no such setting'),
    ('config/align.py --dataset={data}', 'dataset=.* with captions=drawn'),
    ('config/align_pixmo.py --image_px=32', 'image_px: of an encoder without a trunk'),
    ('config/align.py --tokenizer=gpt2', 'tokenizer: no such setting'),
    ('config/align.py --n_latents=-1', 'n_latents=-1: expected 0 or more'),
    ('config/align_sounds.py --max_objects=3', 'max_objects=3 with reads=sound: a setting of pictures'),
    ('config/align_sounds.py --dataset={data}', 'dataset=.* with captions=drawn'),
    ('config/align_sounds.py --trunk={encoder}', 'trunk with captions=drawn|of an encoder without a trunk'),
]


@pytest.mark.parametrize('argv, message', MISTAKES)
def test_mistakes(argv, message, tiny_shapes, tiny_encoder, tmp_path, monkeypatch, capsys):
    """A mistake ends the program with one line that says what was wrong and what to do; --debug adds the trace."""
    words = [word.format(data=tiny_shapes, encoder=tiny_encoder) for word in argv.split()]
    words = [str(ROOT / word) if word.startswith('config/') else word for word in words]
    monkeypatch.setattr(sys, 'argv', ['align', *words, f'--out_dir={tmp_path}/out'])
    with pytest.raises(SystemExit) as end:
        run_script(align_main.main)
    text = capsys.readouterr().err
    assert end.value.code == 1 and text.startswith('error: ') and text.count('\n') == 1 and re.search(message, text), text
    sys.argv.append('--debug')
    with pytest.raises((ValueError, OSError)):
        run_script(align_main.main)


def test_other_stage(tmp_path):
    """A folder of one stage is refused by the other, and eval.py says who reports on it."""
    import eval as evaluation
    import train
    torch.save(dict(format=5, stage='align', settings=dict(out_dir='out/align'), run=dict(step=1, best={})), tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='stage=align there, answer here'):
        train.main([f'--out_dir={tmp_path}'])
    with pytest.raises(ValueError, match='has no decoder.*align.judge'):
        evaluation.main([f'--out_dir={tmp_path}', '--device=cpu'])


# ----------------------------------------------------------------------------
# few pictures, equal captions, and several processes that judge

def captioned(folder, splits):
    """Writes a dataset: {split: [caption or None, ...]}, a picture each, with a question."""
    folder.mkdir()
    for k, (split, captions) in enumerate(splits.items()):
        pictures = [png((10 * i, 80 * k, 9)) for i in range(len(captions))]
        same = [['what?'] * len(captions), ['a'] * len(captions)]
        pq.write_table(pa.table([pictures, *same, pa.array(captions, pa.string())], ['image', 'question', 'answer', 'caption']), folder / f'{split}.parquet')
    return folder


def texts(n):
    return [f'a {"red" if i % 3 else "blue"} thing. number {i}. it is small.' for i in range(n)]


def test_retrieval_of_equal_captions():
    """The picture of a caption that others have too is found if any of theirs is, and rounding, which is another one with other threads, decides nothing."""
    g = torch.Generator().manual_seed(0)
    pictures, said = torch.randn(24, 16, generator=g), [i // 2 for i in range(24)]
    text = pictures[[2 * caption for caption in said]]  # as the first picture of each two; the other is anywhere
    results = []
    for seed in range(4):
        order = torch.randperm(24, generator=g.manual_seed(seed))
        noise = 1e-7 * torch.randn(24, 16, generator=g)
        results.append(judge.retrieval(pictures[order], text[order] + noise, [16], [said[i] for i in order])[16])
    assert results[0]['R@1'] == pytest.approx((24 + 12) / 48, abs=.1) and all(result == results[0] for result in results)
    assert judge.retrieval(torch.full((5, 4), torch.nan), torch.ones(5, 4), [4], ['a'] * 5)[4]['R@1'] == 0
    twice = torch.cat([pictures, pictures + 1e-7])  # nobody said that these are equal: none is the right one for sure
    assert judge.retrieval(twice, twice.flip(0).flip(0), [16])[16] == dict(judge.retrieval(twice, twice, [16])[16], **{'R@1': 0})


def judged_of(folder, **settings):
    torch.manual_seed(0)
    s = AlignConfig(captions='dataset', dataset=str(folder), encoder_width=32, encoder_layers=1, encoder_dim=16, n_latents=4, **settings)
    data = AlignData(s, None)
    model = build(s, data.tokenizer.vocab_size, None).eval()
    data.open_pictures(None, model.encoder, 'cpu')
    return judge.judged(model, data, s, 'cpu', 'val', 1000)


def test_judged_alike(tmp_path, monkeypatch):
    """Every picture is judged, and the numbers of retrieval are the same whatever the order of the rows, the batch and the threads, with equal captions among them."""
    captions = texts(10) + texts(4)
    data = captioned(tmp_path / 'a', dict(train=captions, val=captions, test=captions))
    scores, by_prefix, said = judged_of(data)
    assert len(said) == 14 and len(set(said)) == 10
    other = captioned(tmp_path / 'b', dict(train=captions, val=captions, test=captions))
    rows = pq.read_table(data / 'val.parquet')
    pq.write_table(rows.take(list(range(13, -1, -1))), other / 'val.parquet')
    assert judged_of(other)[0] == scores
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(judge, 'AT_ONCE', 4)
    assert judged_of(other, batch_size=3)[1] == by_prefix
    torch.set_num_threads(threads)


def judge_all(folder):
    """What judging gives, and how many batches this process encoded for it."""
    torch.set_num_threads(1)
    judge.AT_ONCE = 5
    calls = []
    forward = Encoder.forward
    Encoder.forward = lambda *args: calls.append(args) or forward(*args)
    try:
        scores, by_prefix, _ = judged_of(folder)
        probed = judge.probe(small(), DrawnCaptions(ShapesConfig(), None), 'cpu', n_train=20, n_test=10, steps=5)
    finally:
        Encoder.forward, judge.AT_ONCE = forward, 250
    return scores, by_prefix, probed, len(calls)


def test_two_processes_judge(two_processes):
    """Two processes share the validation and the probe, and each has the numbers that one alone has."""
    _, _, data, results = two_processes
    threads = torch.get_num_threads()
    *alone, calls = judge_all(data)
    torch.set_num_threads(threads)
    for _, (*shared, mine) in results:
        assert shared == alone and mine == calls / 2


def test_few_pictures(tmp_path, capsys):
    """A few pictures of one's own go the whole way without a flag for a size, on a frozen trunk and without; that scores of so few are luck is said in both stages."""
    data = captioned(tmp_path / 'mine', dict(train=texts(5), val=texts(1), test=[*texts(2), None]))
    save_encoder(small(n_latents=0, projection='none', vision_dim=32, prefixes=(32,)), tmp_path / 'trunk.pt')
    runs = [f'--dataset={data}', f'--cache_dir={tmp_path}/cache', '--max_steps=1', '--device=cpu']
    for k, trunk in enumerate(([], [f'--trunk={tmp_path}/trunk.pt'])):
        out = tmp_path / f'align{k}'
        align_main.main([str(ROOT / 'config/align_photos.py'), *runs, *trunk, f'--out_dir={out}'])
        said = capsys.readouterr().out
        assert 'batch_size=64: the 5 pictures' in said and 'val: 1 pictures only' in said and 'test: 2 pictures only' in said
        assert re.search(r'1 of 3 pictures have no caption.*row 2; they are left out', said) and 'retrieval among 2 pictures' in said
    train.main([*runs, f'--encoder={out}/encoder.pt', f'--out_dir={tmp_path}/answers', '--n_embd=16', '--n_head=2'])
    assert 'val: 1 questions only' in capsys.readouterr().out
    (tmp_path / 'trunk.pt').rename(tmp_path / 'moved.pt')
    judge.main([f'--out_dir={out}', '--device=cpu', f'--trunk={tmp_path}/moved.pt'])
    with pytest.raises(ValueError, match='not the one that the run was trained with'):
        save_encoder(small(n_latents=0, projection='none', vision_dim=32, prefixes=(32,), n_layer=2), tmp_path / 'other.pt')
        judge.main([f'--out_dir={out}', '--device=cpu', f'--trunk={tmp_path}/other.pt'])


@pytest.mark.parametrize('splits, world, message', [
    (dict(train=texts(5), val=[*texts(2), None]), 1, 'val.parquet: 1 of 3 pictures have no caption.*row 2'),
    (dict(train=texts(1), val=texts(2)), 1, '1 picture to train on'),
    (dict(train=texts(5), val=texts(2)), 2, 'batch_size=5: 2 processes .* --batch_size=4 will do'),
])
def test_early(splits, world, message, tmp_path, monkeypatch):
    """What cannot work is said before a picture is decoded or encoded, with the remedy."""
    monkeypatch.setattr('align.captions.FileTokens', None)
    monkeypatch.setattr(align_main, 'rank_and_world', lambda: (0, world))
    data = captioned(tmp_path / 'mine', splits | dict(test=texts(2)))
    with pytest.raises(ValueError, match=message):
        align_main.main([str(ROOT / 'config/align_photos.py'), f'--dataset={data}', '--device=cpu', f'--out_dir={tmp_path}/out'])
