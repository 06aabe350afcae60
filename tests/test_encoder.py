"""encoder.py: shapes, the safety of its files, the cache, and what alignment trains."""

import hashlib
import io
import os
import random
import struct
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import ExifTags, Image

import encoder as encoder_module
from encoder import Encoder, EncoderConfig, load_encoder, save_encoder
from plumbing import features
from plumbing.features import PixelReader, cached_features, pixel_array
from plumbing.pictures import as_seen, open_picture, rgb_picture


def png(color=(9, 90, 9), size=(64, 64), mode='RGB'):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, 'PNG')
    return buffer.getvalue()


def small(**settings):
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**dict(width=32, n_layer=1, vision_dim=16, prefixes=(4, 8, 16)) | settings)).eval()


@pytest.mark.parametrize('settings, shape', [
    (dict(), (2, 16, 16)), (dict(n_latents=7), (2, 7, 16)), (dict(n_latents=0), (2, 64, 16)),
    (dict(stem='patch', class_token=True, activation='quick_gelu', patch_px=16), (2, 16, 16)), (dict(image_px=32), (2, 16, 16)),
    (dict(n_latents=0, class_token=True, stem='patch'), (2, 64, 16))])
def test_shapes(settings, shape):
    """Every form of the encoder gives (B, N, D), with or without class token, resampler and convolutional stem."""
    e = small(**settings)
    S = e.config.image_px
    assert e.encode_images(torch.randn(2, 3, S, S)).shape == shape
    assert not e.encode_images(torch.randn(2, 3, S, S)).requires_grad


def test_attention_is_attention():
    """The attention written out equals torch's own, with and without a mask."""
    q, k, v = (torch.randn(2, n, 16, dtype=torch.float64) for n in (5, 7, 7))
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[1, 4:] = False
    heads = [t.view(2, -1, 4, 4).transpose(1, 2) for t in (q, k, v)]
    for mask in (None, seen):
        theirs = torch.nn.functional.scaled_dot_product_attention(*heads, None if mask is None else mask[:, None, None])
        assert torch.allclose(encoder_module.attention(q, k, v, 4, mask), theirs.transpose(1, 2).reshape(2, 5, 16), atol=1e-12)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'LA', 'RGBA', 'P', 'CMYK', '1'])
def test_preprocess(mode):
    """A picture of any mode and size becomes a float tensor (3, S, S), normalised by mean and std."""
    e = small()
    for size in ((64, 64), (31, 7), (200, 90)):
        tensor = e.preprocess(Image.new(mode, size))
        assert tensor.shape == (3, 64, 64) and tensor.dtype == torch.float32
    gray = e.preprocess(Image.new('RGB', (64, 64), (51, 51, 51)))
    assert torch.allclose(gray, torch.full_like(gray, (51 / 255 - .5) / .25))


@pytest.mark.parametrize('file', ['PNG', 'TIFF', 'PPM'])
def test_grey_of_16_bits(file):
    """Grey with 16 bits a pixel becomes grey with 8, not white; floats, whose range nobody knows, are refused."""
    levels, buffer = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16, io.BytesIO()
    if file == 'PPM':
        buffer.write(b'P5 64 64 65535\n' + levels.astype('>u2').tobytes())
    else:
        Image.fromarray(levels).save(buffer, file)
    pixels = small().pixels(open_picture(buffer.getvalue()))[0].numpy()
    assert abs(pixels - levels / 257.).max() <= .5
    with pytest.raises(ValueError, match='mode F with values from 0 to 65520: expected 8 or 16 bits a pixel'):
        small().pixels(Image.fromarray(levels.astype(np.float32)))


def made_png(depth, color, levels, *chunks):
    """A PNG of one row, written by hand: Pillow writes no 16-bit colour, nor 2 bits of grey."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    bits = ''.join(f'{level:0{depth}b}' for level in levels)
    pixels = b'\0' + int(bits, 2).to_bytes(len(bits) // 8, 'big')
    header = struct.pack('>2I5B', len(levels) // {0: 1, 2: 3, 4: 2}[color], 1, depth, color, 0, 0, 0)
    content = [(b'IHDR', header), *chunks, (b'IDAT', zlib.compress(pixels)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in content)


@pytest.mark.parametrize('depth, color, levels, transparent, expected', [
    (16, 0, [30000, 5, 4], [5], [117, 255, 0]), (16, 0, [0x1234, 0x1235], [0x1234], [255, 18]), (8, 0, [5, 6], [5], [255, 6]),
    (4, 0, [1, 2], [1], [255, 34]), (2, 0, [0, 1, 2, 3], [2], [0, 85, 255, 255]), (1, 0, [0, 1] * 4, [0], [255] * 8),
    (16, 2, [0x1234] * 3 + [0x3412] * 3, [0x1234] * 3, [255, 52]), (8, 2, [7, 7, 7, 8, 8, 8], [7] * 3, [255, 8]), (16, 4, [30000, 65535, 30000, 0], [], [117, 255])])
def test_transparency_is_judged_in_the_depth_of_the_file(depth, color, levels, transparent, expected):
    """A level or colour that a PNG of any depth names as transparent, and no other, becomes white; grey with 16 bits keeps its levels beside it."""
    trns = [(b'tRNS', struct.pack(f'>{len(transparent)}H', *transparent))] if transparent else []
    assert np.array(rgb_picture(made_png(depth, color, levels, *trns)))[0, :, 0].tolist() == expected


def exif(value, kind=3, count=1, gps=None):
    """EXIF with an orientation, in the bytes of its value, and a GPS directory of one entry."""
    entry = lambda tag, kind, n, v: struct.pack('<HHL', tag, kind, n) + v.ljust(4, b'\0')
    first = struct.pack('<H', 2) + entry(0x112, kind, count, value) + entry(0x8825, 4, 1, struct.pack('<L', 38)) + bytes(4)
    return b'Exif\0\0II*\0\x08\0\0\0' + first + struct.pack('<H', 1) + entry(*(gps or (1, 2, 2, b'N\0'))) + bytes(4)


@pytest.mark.parametrize('form', ['PNG', 'WEBP', 'TIFF', 'JPEG'])
def test_every_orientation(form):
    """Pictures of every format are turned as their orientation says, once however often they are looked at; one out of range leaves them as they lie."""
    picture = Image.fromarray(np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16))).astype(np.uint8)).convert('RGB')
    lies = np.array(picture)
    turns = [lies, lies, lies[:, ::-1], lies[::-1, ::-1], lies[::-1], lies.swapaxes(0, 1), np.rot90(lies, -1), lies[::-1, ::-1].swapaxes(0, 1), np.rot90(lies), lies]
    for orientation, expected in enumerate(turns):
        tag, file = Image.Exif(), io.BytesIO()
        tag[0x112] = orientation
        picture.save(file, form, exif=tag, **dict(lossless=True) if form == 'WEBP' else {})
        seen_once = rgb_picture(file.getvalue())
        assert seen_once.size == expected.shape[1::-1] and abs(np.array(seen_once).astype(int) - expected).max() < 9, orientation
        assert np.array_equal(as_seen(seen_once), seen_once)


@pytest.mark.parametrize('written, is_turned', [
    (exif(b'\6\0', gps=(0, 2, 4, b'2.2\0')), True), (exif(b'\6\0\0\0', kind=4), True), (exif(b'6\0', kind=2, count=2), False), (exif(b'\6', kind=1), False),
    (exif(b'\6\0', kind=3)[:20], False), (b'Exif\0\0II*\0', False), (exif(b'\xff\xff\xff\xff', kind=5), False), (exif(b'\6\0', kind=99), False), (exif(b'\6\0', count=2 ** 31), False)])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_odd_exif(written, is_turned, monkeypatch):
    """Whatever cameras write into EXIF, the orientation is used or the picture is taken as it lies; EXIF is never written."""
    monkeypatch.setattr(Image.Exif, 'tobytes', None)
    file = io.BytesIO()
    Image.new('RGB', (64, 32)).save(file, 'JPEG')
    whole = file.getvalue()
    with_exif = whole[:2] + b'\xff\xe1' + struct.pack('>H', len(written) + 2) + written + whole[2:]
    assert rgb_picture(with_exif).size == ((32, 64) if is_turned else (64, 32))
    assert small().pixels(open_picture(with_exif)).shape == (3, 64, 64)


def test_files(tmp_path):
    """An encoder comes back from its file; the fingerprint tells encoders apart; the file is half as large as the weights."""
    e = small()
    save_encoder(e, tmp_path / 'e.pt')
    back = load_encoder(tmp_path / 'e.pt')
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(back(images), e(images), atol=.02) and back.config == e.config
    assert not any(p.requires_grad for p in back.parameters())
    assert back.fingerprint() == load_encoder(tmp_path / 'e.pt').fingerprint() != e.fingerprint()  # rounded to half precision


class Evil:
    def __reduce__(self):
        return os.system, ('touch HACKED',)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    """A file with code in it is refused and the code is not run; so are files of another kind, torn ones and missing ones."""
    monkeypatch.chdir(tmp_path)
    torch.save(dict(format=1, kind='encoder', config=Evil()), 'evil.pt')
    with pytest.raises(ValueError, match='evil.pt: not a file that can be read safely'):
        load_encoder('evil.pt')
    assert not os.path.exists('HACKED')
    (tmp_path / 'torn.pt').write_bytes((tmp_path / 'evil.pt').read_bytes()[:100])
    with pytest.raises(ValueError, match='torn.pt'):
        load_encoder('torn.pt')
    torch.save({'weights': {}}, 'other.pt')
    with pytest.raises(ValueError, match='not an encoder of this project, not CLIP'):
        load_encoder('other.pt')
    with pytest.raises(FileNotFoundError, match='none.pt: no such encoder file or folder; --encoder=PATH takes CLIP'):
        load_encoder('none.pt')
    torch.save({'kind': 'encoder'}, 'bare.pt')
    with pytest.raises(ValueError, match='bare.pt: an encoder file of format None'):
        load_encoder('bare.pt')


def test_damaged_files(tmp_path):
    """Whatever byte of an encoder file is wrong, it is one message that names the file, or the weights are those that were written."""
    save_encoder(small(width=16, n_layer=1, vision_dim=8, prefixes=(8,)), tmp_path / 'e.pt')
    whole, rng, refused = (tmp_path / 'e.pt').read_bytes(), random.Random(0), 0
    before = load_encoder(tmp_path / 'e.pt').fingerprint()
    for place in [*rng.sample(range(len(whole)), 60), *range(len(whole) - 120, len(whole))]:  # the directory of the archive is at its end
        (tmp_path / 'bad.pt').write_bytes(whole[:place] + bytes([whole[place] ^ rng.randint(1, 255)]) + whole[place + 1:])
        try:
            assert load_encoder(tmp_path / 'bad.pt').fingerprint() == before, place
        except ValueError as e:
            assert 'bad.pt' in str(e)
            refused += 1
    assert refused > 30


def test_weights_are_accounted_for(tmp_path):
    """Missing and left-over weights are an error that lists them."""
    save_encoder(small(), tmp_path / 'e.pt')
    saved = torch.load(tmp_path / 'e.pt', weights_only=True)
    saved['weights']['extra.weight'] = saved['weights'].pop('projection.weight')
    torch.save(saved, tmp_path / 'e.pt')
    with pytest.raises(ValueError, match='projection.weight') as error:
        load_encoder(tmp_path / 'e.pt')
    assert 'extra.weight' in str(error.value)


class Files(list):
    """Picture files in memory, with what the encoder wants to know of them."""
    names = property(lambda self: [f'picture {i}' for i in range(len(self))])

    def __init__(self, files):
        super().__init__(files)
        self.digests = [hashlib.sha256(data).digest() for data in self]


def files_in(folder):
    """All files but the lock, unfinished ones included."""
    return sorted(f for f in folder.iterdir() if f.name != '.lock')


def test_cache(tmp_path, monkeypatch):
    """Features are computed once, equal to encoding anew, and never reused for another encoder, picture or size."""
    e, pictures = small(), Files(png((10 * i, 99, 9)) for i in range(7))
    everything = torch.arange(7)
    fresh = e.encode_images(torch.stack([e.preprocess(open_picture(p)) for p in pictures]))
    fast = cached_features(e, pictures, tmp_path / 'fast')[everything].float()  # in bfloat16 where that is fast
    assert (fast - fresh).abs().max() < 2 ** -6 * fresh.abs().max()
    monkeypatch.setattr('plumbing.features.fast_dtypes', lambda device: [torch.float32])
    features = cached_features(e, pictures, tmp_path)
    assert torch.allclose(features[everything].float(), fresh, atol=2e-3) and len(features) == 7
    calls = []
    monkeypatch.setattr(Encoder, 'encode_images', lambda self, images: calls.append(1) or self(images).detach())
    assert torch.equal(cached_features(e, pictures, tmp_path)[everything], features[everything]) and not calls
    cached_features(e, Files(pictures[:6]), tmp_path)
    assert torch.equal(cached_features(e, pictures, tmp_path, dim=8)[everything], features[everything][..., :8])
    torch.manual_seed(1)
    cached_features(Encoder(e.config), pictures, tmp_path)
    assert calls and len([f for f in files_in(tmp_path) if f.is_file()]) == 4


def test_cache_in_parts(tmp_path, monkeypatch, capsys):
    """A cache in parts holds the same; killed on the way, it goes on behind the last whole part; a damaged part is made again."""
    e, pictures = small(), Files(png((10 * i, 99, 9)) for i in range(11))
    part = 3 * 2 * 16 * 16  # three pictures
    whole = cached_features(e, pictures, tmp_path / 'whole')[torch.arange(11)]
    monkeypatch.setattr(Encoder, 'at_once', 2)
    encode, calls = Encoder.encode_images, []

    def killed(self, images):
        calls.append(len(images))
        if len(calls) == 5:  # the fourth batch is not written yet
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encoder, 'encode_images', killed)
        cached_features(e, pictures, tmp_path / 'parts', part_bytes=part)
    kept = files_in(tmp_path / 'parts')
    assert len(kept) == 2 and all(f.suffix == '.npy' for f in kept)
    features = cached_features(e, pictures, tmp_path / 'parts', part_bytes=part)
    assert 'encoding 5 pictures' in capsys.readouterr().out
    assert len(features.files) == 4 and torch.allclose(features[torch.arange(11)].float(), whole.float(), atol=2e-3)
    order = torch.tensor([10, 0, 5, 5, 3])
    assert torch.equal(features[order], features[torch.arange(11)][order])
    kept[1].write_bytes(kept[1].read_bytes()[:-1])
    cached_features(e, pictures, tmp_path / 'parts', part_bytes=part)
    text = capsys.readouterr().out
    assert 'damaged, it is made again' in text and 'encoding 3 pictures' in text


def test_cache_needs_room(tmp_path, monkeypatch):
    """The need is said before anything is encoded, and where the disk is too small that is an error that says what helps."""
    monkeypatch.setattr(features.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(ValueError, match='are needed.*--vision_dim.*--cache=false'):
        cached_features(small(), Files([png()]), tmp_path)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
def test_large_jpegs(mode, tmp_path):
    """A JPEG of four times the side of the square, or eight, is decoded at a half or a quarter of its size, turned as its EXIF says, and is off by a few levels
    at most; smaller ones, and other formats, are decoded as they are; one that is cut off is refused all the same."""
    waves = sum(np.sin(np.outer(np.arange(600) / a, np.ones(700)) + np.arange(700) / b) for a, b in ((9, 17), (40, 23), (90, -61)))
    levels = np.stack([(waves - waves.min()) / np.ptp(waves) * 255, np.full((600, 700), 90.), waves * 20 + 90], -1).astype(np.uint8)
    encoder = Encoder(EncoderConfig(width=32, n_layer=1, n_latents=4, image_px=64))

    def saved(width, format, **more):
        buffer = io.BytesIO()
        Image.fromarray(levels).convert(mode).resize((width, width * 6 // 7)).save(buffer, format, **more)
        return buffer.getvalue()

    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for width, size in ((700, (175, 150)), (350, (175, 150)), (290, (290, 248))):  # 600 is more than 8 * 64, 300 more than 4 * 64, 248 is less
        data = saved(width, 'JPEG', quality=95, exif=turned)
        assert encoder.open(data).size == size
        off = (encoder.pixels(encoder.open(data)).int() - encoder.pixels(open_picture(data)).int()).abs()
        assert off.max() <= 4 and off.float().mean() < .5 and (off.any() == (width > 290))
        with pytest.raises(ValueError, match='can be decoded'):
            encoder.open(data[:len(data) // 2])
    if mode != 'CMYK':
        assert encoder.open(saved(700, 'PNG')).size == (700, 600)


def test_preprocess_elsewhere():
    """A picture is made ready where the encoder is, on a GPU too."""
    ready = small().to('meta').preprocess(Image.new('RGB', (70, 80)))
    assert ready.is_meta and ready.shape == (3, 64, 64)


def test_bad_pictures_are_named(tmp_path):
    """Pictures that cannot be decoded are counted and named, all of them, and no part with one of them is kept."""
    bad = Files([png(), b'<html>not found</html>', png()[:60], png((1, 2, 3))])
    for read in (lambda: cached_features(small(), bad, tmp_path), lambda: pixel_array(small(), bad)):
        with pytest.raises(ValueError, match='2 of 4 pictures cannot be used: picture 1: not a picture.*picture 2'):
            read()
    assert not files_in(tmp_path)
    with pytest.raises(ValueError, match='2 of 4'):
        cached_features(small(), bad, tmp_path, part_bytes=2 * 16 * 16)  # a part a picture
    assert len(files_in(tmp_path)) == 2
    bad.digests = [b'other'] * 4
    with pytest.raises(ValueError, match='it has changed since'):
        cached_features(small(), bad, tmp_path)
    bad = Files(bad)
    with pytest.raises(ValueError, match='picture 1: not a picture'):
        PixelReader(small(), bad)[torch.tensor([0, 1])]


def test_pixel_reader():
    """Pictures read when they are asked for are those that are read at once."""
    e, pictures = small(), Files(png((10 * i, 99, 9), (30 + i, 50)) for i in range(5))
    reader, everything, order = PixelReader(e, pictures), pixel_array(e, pictures), torch.tensor([4, 1, 1])
    assert torch.equal(reader[order], everything[order])


def test_files_ahead_are_bounded_in_bytes(monkeypatch):
    """However large a batch is, few files wait to be decoded where they are large; a picture that comes twice in a batch is read once, and all in order."""
    pictures, read = Files(png((10 * i, 99, 9)) for i in range(20)), []
    monkeypatch.setattr(features, 'AHEAD_BYTES', 3 * len(pictures[0]))
    with ThreadPoolExecutor() as pool:
        for most, expected in ((100, 5), (2, 3)):
            read.clear()
            files = ((read.append(i), (i, data))[1] for i, data in enumerate(pictures))
            waiting = [len(read) - done for done, _ in enumerate(features.decode_ahead(small(), pictures, files, most, pool))]
            assert max(waiting) <= expected and len(waiting) == 20
    monkeypatch.setattr(Files, '__getitem__', lambda self, i: read.append(i) or list.__getitem__(self, i), raising=False)
    read.clear()
    assert torch.equal(PixelReader(small(), pictures)[torch.tensor([9, 2, 9, 4])], pixel_array(small(), pictures)[[9, 2, 9, 4]]) and read == [2, 4, 9]


def test_gigantic_pictures_are_refused():
    """A small file that says it is a huge picture is refused before its pixels are made."""
    with pytest.raises(ValueError, match='more than 67108864 pixels: 9000 x 9000'):
        open_picture(png(0, (9000, 9000), '1'))
    thin = Image.new('1', (1, 300000))
    assert small().pixels(thin).shape == (3, 64, 64)


@pytest.mark.parametrize('size', [(1, 300000), (300000, 1), (2, 400001)])
def test_long_and_thin_pictures(size):
    """The middle of a picture so long that it would fill the memory when its short side is stretched comes out, and of all others what came out before."""
    crop = small(fit='crop', image_px=336, patch_px=16, stem='patch')
    long = Image.new('L', size)
    long.paste(200, tuple(n // 2 - 9 for n in size) + tuple(n // 2 + 9 for n in size))
    assert crop.pixels(long).shape == (3, 336, 336) and (crop.pixels(long) == 200).all()
    less = Image.effect_noise((3, 500), 90)
    whole = less.convert('RGB').resize((336, 56000), Image.BICUBIC).crop((0, 27832, 336, 28168))
    assert torch.equal(crop.pixels(less), torch.from_numpy(np.array(whole)).permute(2, 0, 1))


def test_damaged_exif():
    """A picture whose EXIF data is damaged is taken as it lies."""
    buffer = io.BytesIO()
    Image.new('RGB', (64, 64)).save(buffer, 'PNG', exif=b'Exif\0\0garbage')
    assert small().pixels(open_picture(buffer.getvalue())).shape == (3, 64, 64)


@pytest.mark.parametrize('bad', [dict(prefixes=(4, 8)), dict(prefixes=(16, 32)), dict(prefixes=()), dict(pool=3), dict(fit='stretch'), dict(image_px=60), dict(perceiver_width=64), dict(width=30), dict(width=40, n_head=3),
                                 dict(perceiver_width=32, perceiver_heads=3), dict(vision_dim=16, projection='none')])
def test_bad_settings(bad):
    """A setting out of range is an error that names it."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        small(**bad)


@pytest.mark.skipif(not (ROOT / 'assets/encoder_shapes.pt').is_file(), reason='the encoder is not trained yet')
def test_shipped_encoder():
    """The shipped encoder loads, is under 4 MB, and tells pictures of one object apart by place."""
    path = ROOT / 'assets/encoder_shapes.pt'
    assert path.stat().st_size < 4e6
    e = load_encoder(path)
    tokens = []
    for place in ((20, 20), (44, 20), (20, 44)):
        picture = Image.new('RGB', (64, 64), (236, 236, 236))
        picture.paste((220, 40, 40), (place[0] - 7, place[1] - 7, place[0] + 7, place[1] + 7))
        tokens.append(e.encode_images(e.preprocess(picture)[None]))
    assert min((a - b).norm() / a.norm() for a in tokens for b in tokens if a is not b) > .1


def test_command_line(tmp_path, tiny_encoder, capsys):
    """encoder.py encodes a picture file and shows shapes and time."""
    (tmp_path / 'a.png').write_bytes(png(size=(30, 50)))
    encoder_module.main([str(tmp_path / 'a.png'), f'--encoder={tiny_encoder}'])
    assert '(1, 3, 64, 64) -> (1, 4, 16)' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        encoder_module.main([])
