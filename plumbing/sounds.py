"""Sounds: decoded safely, mixed down to one channel, and their spectra, as a picture or as numbers."""

import io
import struct
import wave
from functools import lru_cache

import numpy as np
from PIL import Image

from plumbing.files import impostor

MOST_BYTES = 2**25      # of a file
MOST_SECONDS = 60
MOST_SAMPLES = 2 ** 24  # in all channels: 64 MB while it is mixed down
MOST_CHANNELS = 32
RATES = 8_000, 192_000  # samples a second of a file, at least and at most

RATE = 16_000           # samples a second that a spectrum is made of
WINDOW = 400            # samples of a frame: 25 ms
HOP = 160               # samples from one frame to the next: 10 ms
LEAST_SECONDS = 2.56    # of a picture: silence follows a shorter sound

# what files begin with; an MP3 without a tag begins with a frame
KINDS = {b'RIFF': 'WAV', b'fLaC': 'FLAC', b'OggS': 'OGG', b'ID3': 'MP3', b'\xff\xfb': 'MP3',
         b'\xff\xf3': 'MP3', b'\xff\xf2': 'MP3'}

# what wave and soundfile raise for a bad file
UNREADABLE = (wave.Error, EOFError, struct.error, OSError, RuntimeError, TypeError, LookupError,
              ArithmeticError, AttributeError, AssertionError, MemoryError)


def spectrum_picture(data, bands=64):
    """A sound file as a grey Pillow picture, which an encoder makes square as any other: time goes to the
    right, pitch up, the loudest is white and what is 80 dB below it black. Raises: ValueError.

    Shapes: -> `bands` pixels high, a pixel wide for each HOP
    """
    samples, rate = open_sound(data)
    samples = resampled(samples, rate, RATE)
    missing = max(0, round(LEAST_SECONDS * RATE) - len(samples))
    mel = log_mel(np.pad(samples, (0, missing)), bands)                # (bands, frames)
    # the loudest of a usual sound is above .5: silence stays black
    white = max(mel.max(), 0.5)
    grey = (255 * (mel - white + 2) / 2).clip(0, 255).round()          # (bands, frames)
    return Image.fromarray(grey[::-1].astype(np.uint8))                # the first row is the highest pitch


def spectrum(data, bands, frames):
    """A sound file as Whisper hears it: its log-mel spectrogram, not rounded to levels of grey. Silence
    follows a sound that is shorter than the frames, a longer one is cut. Raises: ValueError.

    Shapes: -> (bands, frames) float32
    """
    samples, rate = open_sound(data)
    samples = resampled(samples, rate, RATE)[:frames * HOP]
    missing = frames * HOP - len(samples)
    return log_mel(np.pad(samples, (0, missing)), bands).astype(np.float32)


# ----------------------------------------------------------------------------
# files


def open_sound(data):
    """Decodes a sound file completely -> its samples, -1 to 1, channels mixed down, and how many a second.

    WAV of whole numbers needs nothing; other kinds need the package soundfile.
    Shapes: -> (n,) float32, and a number
    Raises: ValueError where it is no sound, is cut off, empty or too large: its kind, a colon, the details.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f'more than {MOST_BYTES} bytes: {len(data)}')
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise ValueError(f"not a sound: {impostor(data) or 'of no known format: expected WAV'}")
    try:
        decoded = read_wav(data) if kind == 'WAV' else None
        samples, rate = decoded or read_other(data, kind)              # (n, channels)
    except UNREADABLE as e:
        raise ValueError(f'not a sound that can be decoded: {str(e) or type(e).__name__}') from None
    samples = samples.mean(1, dtype=np.float32)                        # (n,)
    if not np.isfinite(samples).all():
        raise ValueError('a sound with samples that are no finite numbers')
    return samples, rate


def check_form(n, channels, rate):
    """Raises: ValueError where a sound has no samples, or another form than can be used."""
    if not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f'a sound of {channels} channels: expected 1 to {MOST_CHANNELS}')
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f'a sound of {rate} samples a second: expected {RATES[0]} to {RATES[1]}')
    if n < 1:
        raise ValueError('a sound without samples')
    if n > MOST_SECONDS * rate:
        raise ValueError(f'a sound of more than {MOST_SECONDS} seconds: {n / rate:.0f}')
    if n * channels > MOST_SAMPLES:
        raise ValueError(f'a sound of {n * channels} samples in all channels: expected {MOST_SAMPLES} at '
                         'most')


def read_wav(data):
    """The samples of a WAV file and their rate, or None where they are no whole numbers.

    Shapes: -> (n, channels) float32, and a number
    Raises: ValueError; any of UNREADABLE.
    """
    try:
        file = wave.open(io.BytesIO(data))
    except wave.Error as e:
        if str(e).startswith(('unknown format', 'unknown extended format')):  # floats, say
            return None
        raise
    n = file.getnframes()
    channels = file.getnchannels()
    width = file.getsampwidth()
    if width > 4:
        raise ValueError(f'a sound of {8 * width} bits a sample: expected 8, 16, 24 or 32')
    there = len(data) // (channels * width)  # at most: a header may lie
    check_form(min(n, there), channels, file.getframerate())
    raw = file.readframes(n)
    there = len(raw) // (channels * width)
    if there < n:  # the header promises more
        raise ValueError(f'a sound that is cut off: {there} of {n} samples are there')
    return whole_numbers(raw, width).reshape(n, channels), file.getframerate()


def whole_numbers(raw, width):
    """Samples of `width` bytes as floats from -1 to 1. Shapes: -> (n,) float32"""
    if width == 1:  # without a sign
        return np.frombuffer(raw, np.uint8).astype(np.float32) / 128 - 1
    # what lacks in four bytes is put below, so that the sign stays where it is
    wide = np.zeros((len(raw) // width, 4), np.uint8)
    wide[:, 4 - width:] = np.frombuffer(raw, np.uint8).reshape(-1, width)      # (n, width)
    return wide.view('<i4')[:, 0].astype(np.float32) / 2**31           # (n,)


def read_other(data, kind):
    """As `read_wav`, of any kind that the package soundfile knows."""
    try:
        import soundfile
    except ImportError:
        raise ValueError(f'a sound of the kind {kind}, not WAV of whole numbers: to read it, pip install '
                         'soundfile') from None
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        check_form(len(file), file.channels, file.samplerate)
        samples = file.read(dtype='float32', always_2d=True)           # (n, channels)
        check_form(len(samples), file.channels, file.samplerate)
        return samples, file.samplerate


# ----------------------------------------------------------------------------
# spectra


def resampled(samples, rate, new_rate):
    """The same sound with another number of samples a second; what these cannot hold is left out.

    Shapes: (n,) -> (n * new_rate / rate,) float64. Source: scipy.signal.resample, which it equals.
    """
    n = max(1, round(len(samples) * new_rate / rate))
    spectrum = np.fft.rfft(samples.astype(np.float64))                 # (len / 2 + 1,)
    # frequencies above half of the lower rate would come back as others
    kept = spectrum[:min(n, len(samples)) // 2 + 1].copy()
    if n != len(samples) and min(n, len(samples)) % 2 == 0:  # the highest one stands for two, or for one
        kept[-1] *= 2 if n < len(samples) else 0.5
    return np.fft.irfft(kept, n) * (n / len(samples))


def log_mel(samples, bands=80):
    """The log-mel spectrogram, about -1 to 1.5: the logarithm of the power in each band of each frame, not
    more than 80 dB below the largest.

    Shapes: (n,), RATE a second and at least WINDOW of them -> (bands, n / HOP)
    Source: Whisper (Radford 2022, arXiv 2212.04356); equal to transformers' WhisperFeatureExtractor.
    """
    padded = np.pad(samples, WINDOW // 2, mode='reflect')              # frames stand around their time
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]   # (n / HOP + 1, WINDOW)
    hann = np.hanning(WINDOW + 1)[:-1]                                 # (WINDOW,)
    power = np.abs(np.fft.rfft(frames[:-1] * hann)) ** 2               # (n / HOP, WINDOW / 2 + 1)
    mel = mel_filters(bands) @ power.T                                 # (bands, n / HOP)
    log = np.log10(mel.clip(1e-10))
    return (log.clip(log.max() - 8) + 4) / 4


def mel_of(hertz):
    """Slaney's scale: even steps up to 1,000 Hz, then equal ratios."""
    high = 15 + 27 * np.log(np.maximum(hertz, 1e-9) / 1000) / np.log(6.4)
    return np.where(hertz < 1000, 3 * hertz / 200, high)


def hertz_of(mel):
    """What `mel_of` undoes."""
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@lru_cache
def mel_filters(bands):
    """Triangles over the frequencies of a frame, of equal area. Shapes: -> (bands, WINDOW / 2 + 1)
    Source: Slaney's Auditory Toolbox, as librosa has it."""
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    edges = hertz_of(np.linspace(0, mel_of(RATE / 2), bands + 2))      # (bands + 2,)
    low, middle, high = (edges[k:bands + k, None] for k in range(3))   # (bands, 1) each
    rising = (frequencies - low) / (middle - low)                      # (bands, WINDOW / 2 + 1)
    falling = (high - frequencies) / (high - middle)                   # (bands, WINDOW / 2 + 1)
    return np.minimum(rising, falling).clip(0) * 2 / (high - low)
