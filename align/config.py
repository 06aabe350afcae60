"""The settings of stage 1."""

import re
from dataclasses import dataclass, fields

from configurator import expect
from train import check_numbers


@dataclass
class AlignConfig:
    # the run
    out_dir: str = 'out/align'      # folder for everything that the run writes
    fresh: bool = False             # start over even if out_dir holds a run
    seed: int = 1337                # of the weights and the batches
    device: str = 'auto'            # auto (a GPU if there is one), cpu, cuda, ...
    dtype: str = 'auto'             # float32, bfloat16, float16, or auto: bfloat16 where it is fast
    deterministic: bool = False     # the same bits every time, on a GPU too; slower there
    compile: bool = False           # torch.compile: takes minutes, which a long run earns back
    log_interval: int = 50          # steps between log lines
    eval_interval: int = 300        # steps between validations, each followed by a checkpoint
    wandb: bool = False             # log to Weights & Biases too (pip install wandb)
    # pictures and captions
    captions: str = 'drawn'         # drawn: shapes or melodies, as they are needed; dataset: those of it
    reads: str = 'picture'          # or sound: what the captions are of
    max_objects: int = 6            # objects in a drawn picture, at most
    variety: float = 0.7            # share of the drawn pictures that look like no other
    dataset: str = 'data/shapes'    # with captions=dataset: folder of parquet files
    cache_dir: str = 'data/cache'   # where what a frozen trunk makes of pictures is kept
    cache: bool = True              # false: decode and encode pictures anew in every step
    vocab_size: int = 512           # of the BPE that is trained on the captions, at most
    # the encoder, see encoder.EncoderConfig
    trunk: str | None = None        # an encoder (CLIP, Whisper) whose trunk is frozen; None: one is trained
    encoder_px: int | None = None   # with a trunk: side of its pictures, in pixels; None: as it was made for
    fit: str | None = None          # pictures become square: crop, squash or pad; None: its own way
    upright: bool | None = None     # turn pictures as EXIF says; None: as it was made for
    activation: str | None = None   # of CLIP, quick_gelu or gelu; None: what its files say
    init_from: str | None = None    # encoder file to start from, of these sizes; None: fresh weights
    image_px: int = 64              # side of the picture, without a trunk
    encoder_width: int = 128        # width, without a trunk
    encoder_layers: int = 2         # layers, without a trunk
    pool: int = 1                   # the trunk's patches are averaged pool x pool
    adapter: str = 'none'           # between trunk and resampler: none, linear or mlp
    n_latents: int = 16             # tokens of a picture; 0: its patches, without a resampler
    perceiver_layers: int = 2       # layers of the resampler
    perceiver_width: int | None = None  # of the resampler; None: the trunk's
    perceiver_heads: int = 4        # attention heads of the resampler
    encoder_dim: int = 128          # dimensions of a token
    prefixes: str | None = None     # Matryoshka, separated by commas; None: an eighth, a quarter, a half, all
    # the text tower and the loss
    objective: str = 'both'         # contrast, cloze or both
    text_width: int = 128           # width of the text tower
    text_layers: int = 1            # layers of the text tower
    # the optimizer
    optimizer: str = 'muon'         # muon: Muon on matrices, AdamW on the rest; adamw: on all
    max_steps: int = 1800           # optimizer steps
    batch_size: int = 128           # pictures in a forward pass
    grad_accum: int = 1             # forward passes in an optimizer step
    learning_rate: float = 2e-3     # at its peak
    min_lr_ratio: float = 0.1       # of the peak, at the end of the cosine
    warmup_ratio: float = 0.05      # of the steps
    weight_decay: float = 0.05      # on matrices and the kernels of convolutions alone
    beta1: float = 0.9              # of AdamW
    beta2: float = 0.95             # of AdamW
    momentum: float = 0.95          # of Muon
    grad_clip: float = 1.0          # largest norm of the gradient; 0: no limit
    skip_bad_steps: int = 0         # so many steps may be not finite; they are left out
    ema: float = 0.998              # decay of the averaged weights, which are judged; 0: none

    def __post_init__(self):
        expect(self, optimizer=('muon', 'adamw'), dtype=('auto', 'float32', 'bfloat16', 'float16'),
               captions=('drawn', 'dataset'), reads=('picture', 'sound'),
               objective=('contrast', 'cloze', 'both'))
        check_numbers(self)
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        idle = [key for key in changed if key in ('image_px', 'encoder_width', 'encoder_layers')]
        if self.vocab_size < 259:
            raise ValueError(f'vocab_size={self.vocab_size}: expected at least 259, '
                             'the bytes and three marks')
        if self.n_latents < 0:
            raise ValueError(f'n_latents={self.n_latents}: expected 0 or more')
        if self.captions == 'drawn' and 'dataset' in changed:
            raise ValueError(f'dataset={self.dataset} with captions=drawn: pictures are drawn '
                             'as they are needed; give --captions=dataset')
        for key in ('max_objects', 'variety', 'fit', 'upright'):
            if self.reads == 'sound' and key in changed:
                raise ValueError(f'{key}={getattr(self, key)} with reads=sound: a setting of pictures')
        if self.trunk and idle:
            raise ValueError(f'{", ".join(idle)}: of an encoder without a trunk; '
                             'the trunk has sizes of its own (--encoder_px is the side of its pictures)')
        if self.trunk and self.captions == 'drawn':
            raise ValueError(f'trunk with captions=drawn: a pretrained trunk reads the {self.reads}s of a '
                             'dataset; give --captions=dataset')
        if self.encoder_px and not self.trunk:
            raise ValueError('encoder_px without a trunk: the side of the pictures is then --image_px')
        if self.init_from and self.trunk:
            raise ValueError(f'init_from={self.init_from} with trunk={self.trunk}: one of the two')
        if self.prefixes and not re.fullmatch(r'\d+(,\d+)*', self.prefixes):
            raise ValueError(f'prefixes={self.prefixes}: expected numbers, separated by commas')
