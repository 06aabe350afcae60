"""
Training: a decoder learns to answer questions about pictures and sounds.

    python train.py config/trm.py                    # the main job: trains, evaluates, writes out/trm
    python train.py config/trm.py --inner_steps=8    # any setting, overridden; --help lists them
    torchrun --standalone --nproc_per_node=4 train.py config/trm.py    # the same run, by four processes

The same command goes on where a stopped or killed run stood, to the same result. A run folder gets ckpt.pt,
log.jsonl, metrics.json, predictions.jsonl and pictures. The encoder was trained before: config/align.py, then
align_wild.py. The optimizers are in plumbing/optimizers.py.
"""

import copy
import importlib
import math
import random
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

import eval as evaluation  # eval alone is Python's own
from configurator import configure, echo, expect
from data import Questions, open_tokenizer, read_rows, train_bpe
from encoder import encoder_names, encoder_of_run
from model import Decoder, ModelConfig, build_model
from plumbing.console import GOES_ON, clock, run_script, say_if_few
from plumbing.features import ContextTokens, is_trained
from plumbing.files import locked
from plumbing.graphs import Captured, writer_of
from plumbing.machine import autocast_to, compile_layers, flops_of, most_memory, on_device, pick_dtype, pinned
from plumbing.novelty import what_was_seen
from plumbing.optimizers import Guard, follow, make_optimizers, set_learning_rate, update
from plumbing.ranks import all_reduce, alone, in_turn, processes, rank_and_world
from plumbing.results import already_finished, result_table, write_results
from plumbing.run import (
    FORMAT,
    Log,
    Run,
    Stop,
    begin,
    end_early,
    put_back,
    read_results,
    read_start,
    save,
    saved_run,
    say_where,
    start_from,
    unchanged,
    validation_curve,
)
from plumbing.steps import Ahead, batches_of_step
from plumbing.tables import check_splits
from prepare.shapes import Config as ShapesConfig
from prepare.shapes import draw_shapes
from pretrained.decoders import found_folder
from pretrained.tokenizers import read_tokenizer, with_prompt

# may differ when a run goes on: they change its result by rounding at most
FREE = ('fresh', 'out_dir', 'device', 'compile', 'graphs', 'log_interval', 'wandb', 'skip_bad_steps',
        'cache_dir')
# settings with ranges of their own, which may be 0; variety and n_latents are settings of align
MAY_BE_ZERO = ('seed', 'grad_clip', 'skip_bad_steps', 'ema', 'weight_decay', 'min_lr_ratio', 'warmup_ratio',
               'beta1', 'beta2', 'momentum', 'variety', 'n_latents', 'draw_after')

# settings that a pretrained decoder brings along, and those that go with one
OF_OURS = ('norm', 'qk_norm', 'prefix_lm', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'tokenizer',
           'vocab_size')
OF_PRETRAINED = ('train_decoder', 'decoder_lr', 'recur_layers', 'prompt', 'checkpoint_blocks')


@dataclass
class TrainConfig:
    # the run
    out_dir: str = 'out/trm'                  # folder for everything that the run writes
    fresh: bool = False                       # start over even if out_dir holds a run
    init_from: str | None = None              # folder of another run: start from its decoder and tokenizer
    seed: int = 1337                          # of the weights and the batches
    device: str = 'auto'                      # auto (a GPU if there is one), cpu, cuda, ...
    dtype: str = 'auto'                       # float32, bfloat16, float16, or auto: bfloat16 where it is fast
    deterministic: bool = False               # the same bits every time, on a GPU too; slower there
    compile: bool = False                     # torch.compile: takes minutes, which a long run earns back
    graphs: bool = True                       # on a GPU: launch the kernels of a step in one go
    log_interval: int = 50                    # steps between log lines
    eval_interval: int = 300                  # steps between validations, each followed by a checkpoint
    wandb: bool = False                       # log to Weights & Biases too (pip install wandb)
    # pictures and words
    dataset: str = 'data/shapes'              # folder of parquet files; data/shapes is drawn if it is missing
    cache_dir: str = 'data/cache'             # where encoded pictures are kept
    cache: bool = True                        # false: decode and encode pictures anew in every step
    encoder: str = 'assets/encoder_shapes.pt' # the frozen encoder: this project's file, or CLIP
    encoder_px: int | None = None             # side of its pictures, in pixels; None: as it was made for
    fit: str | None = None                    # pictures become square: crop, squash or pad; None: its own way
    upright: bool | None = None               # turn pictures as EXIF says; None: as it was made for
    activation: str | None = None             # of CLIP, quick_gelu or gelu; None: what its files say
    train_encoder: bool = False               # train the encoder along instead of freezing it
    vision_dim: int | None = None             # Matryoshka: read only so many dimensions of a token; None: all
    sound_encoder: str | None = None          # a frozen one of sounds; None: a small new one, trained along
    tokenizer: str = 'bpe'                    # bpe: trained on the training questions and answers; gpt2
    vocab_size: int = 512                     # of the bpe, at most
    max_question_tokens: int = 32             # a longer question is an error, or cut with truncate
    max_answer_tokens: int = 64               # the same for the answer, <eos> included
    truncate: bool = False                    # cut what is too long
    # the decoder, see model.ModelConfig
    kind: str = 'trm'                         # plain or trm
    n_layer: int = 2                          # blocks in the network
    n_head: int = 4                           # attention heads
    n_kv_head: int | None = None              # heads of keys and values, which others share; None: n_head
    n_embd: int = 128                         # width
    recursion: str = 'concat'                 # concat: [y ; z] together; add: e + y + z; loop: y alone
    inner_steps: int = 4                      # n, passes of a cycle; add makes one more; judged with so many
    recall: bool = True                       # written tokens come in at every pass; add always has them
    min_inner_steps: int | None = None        # a step draws its passes, from this to inner_steps; None: no
    draw_after: float = 0.0                   # share of the steps that have min_inner_steps, before any draws
    outer_steps: int = 1                      # cycles of so many passes; no gradient crosses them
    deep_supervision: bool = False            # every cycle is trained on; false: the last one only
    checkpoint_recursion: bool = False        # recompute passes for the gradient: less memory, more time
    norm: str = 'post'                        # post: blocks norm what they hand on; pre: what they read
    qk_norm: bool = True                      # norm queries and keys
    use_vision: bool = True                   # false: the blind control
    use_sound: bool = False                   # true: the sounds of the rows are heard
    prefix_lm: bool = True                    # the context sees itself both ways; false: causally
    # a pretrained language model as the decoder (docs/pretrained.md): its sizes are its own
    decoder: str | None = None                # its folder, or its name on the hub; None: a new decoder
    train_decoder: str = 'all'                # all of it; or projection: what is new alone, gates and z too
    decoder_lr: float = 1.0                   # the share of the learning rate that its own weights take
    recur_layers: int | None = None           # a TRM's passes go through so many blocks, the last; None: all
    prompt: str | None = None                 # what a question stands in; None: what its family is used to
    checkpoint_blocks: bool = False           # recompute every block for the gradient: for deep decoders
    # the optimizer
    optimizer: str = 'muon'                   # muon: Muon on matrices, AdamW on the rest; adamw: on all
    max_steps: int = 1800                     # optimizer steps
    batch_size: int = 128                     # rows in a forward pass; fewer where answers are long
    grad_accum: int = 1                       # forward passes in an optimizer step
    learning_rate: float = 2e-3               # at its peak
    encoder_lr: float = 1.0                   # the share of it that a trained encoder takes
    min_lr_ratio: float = 0.1                 # of the peak, at the end of the cosine
    warmup_ratio: float = 0.05                # of the steps
    weight_decay: float = 0.05                # on matrices and the kernels of convolutions alone
    beta1: float = 0.9                        # of AdamW
    beta2: float = 0.95                       # of AdamW
    momentum: float = 0.95                    # of Muon
    grad_clip: float = 1.0                    # largest norm of the gradient; 0: no limit
    skip_bad_steps: int = 0                   # so many steps with a loss or gradient not finite are left out
    ema: float = 0.998                        # decay of the averaged weights, which are judged; 0: none

    def __post_init__(self):
        expect(self, optimizer=('muon', 'adamw'), dtype=('auto', 'float32', 'bfloat16', 'float16'),
               tokenizer=('bpe', 'gpt2'),
               train_decoder=('all', 'projection'))
        check_numbers(self)
        if self.tokenizer == 'bpe' and self.vocab_size < 259:
            raise ValueError(f'vocab_size={self.vocab_size}: expected at least 259, '
                             'the bytes and three marks')
        if self.encoder_lr != 1 and not self.train_encoder:
            raise ValueError(f'encoder_lr={self.encoder_lr}: the encoder is frozen; '
                             'give --train_encoder=true')
        if self.train_encoder and not self.use_vision:
            raise ValueError('train_encoder=True with use_vision=False: '
                             'there is no picture to train the encoder on')
        for key in OF_OURS if self.decoder else OF_PRETRAINED:
            if getattr(self, key) != getattr(TrainConfig, key):
                raise ValueError(f'{key}={getattr(self, key)}: goes {"without" if self.decoder else "with"} '
                                 '--decoder, a pretrained one')
        for key in ('decoder', 'encoder', 'sound_encoder'):
            if getattr(self, key) == '':  # an unset variable, say
                raise ValueError(f'{key} is empty: expected the name of a file or folder, or one on the hub')
        if self.train_decoder == 'projection' and not self.use_vision and not self.use_sound:
            raise ValueError('train_decoder=projection with use_vision=False: there is none to train')
        if self.norm == 'rms':
            raise ValueError('norm=rms: --decoder, a pretrained one, sets it')
        if self.prompt is not None and self.prompt.count('{question}') != 1:
            raise ValueError(f'prompt={self.prompt}: expected {{question}} in it, once')
        # bad sizes are said now, not after the pictures are encoded
        self.model_config(vision_dim=1, **dict(recur_layers=None, norm='rms') if self.decoder else {})
        if self.kind == 'plain':
            self.min_inner_steps = None  # it is passed once
        if not 0 <= self.draw_after <= 1:
            raise ValueError(f'draw_after={self.draw_after}: expected a share of the steps, 0 to 1')
        if self.min_inner_steps is not None and self.min_inner_steps > self.inner_steps:
            raise ValueError(f'min_inner_steps={self.min_inner_steps}: expected at most '
                             f'inner_steps={self.inner_steps}')

    def model_config(self, **more):
        """The ModelConfig that these settings ask for; `more` is what data and encoder add to it."""
        return ModelConfig(**self.model_settings() | more)

    def model_settings(self):
        return {f.name: getattr(self, f.name) for f in fields(ModelConfig) if hasattr(self, f.name)}


def check_numbers(settings):
    """Ranges of the settings that every training has. Raises: ValueError that names the setting."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        # not isinstance: a bool is an int too
        if type(value) in (int, float) and value <= 0 and f.name not in MAY_BE_ZERO:
            raise ValueError(f'{f.name}={value}: expected more than 0')
    if settings.grad_clip < 0 or settings.skip_bad_steps < 0:
        raise ValueError(f'grad_clip={settings.grad_clip}, skip_bad_steps={settings.skip_bad_steps}: '
                         'expected 0 or more')
    if not 0 <= settings.min_lr_ratio <= 1:
        raise ValueError(f'min_lr_ratio={settings.min_lr_ratio}: expected between 0 and 1')
    for key in ('ema', 'warmup_ratio', 'beta1', 'beta2', 'momentum', 'weight_decay'):
        if not 0 <= getattr(settings, key) < 1:
            raise ValueError(f'{key}={getattr(settings, key)}: expected at least 0 and less than 1')
    if not settings.out_dir.strip():  # an unset variable, say: --fresh=true would clear the current folder
        raise ValueError('out_dir is empty: expected the name of a folder')
    if not 0 <= settings.seed < 2 ** 63:
        raise ValueError(f'seed={settings.seed}: expected 0 to 2^63 - 1')
    if settings.wandb:  # tried now, or a long start would end in an error
        try:
            importlib.import_module('wandb')
        except ImportError:
            raise ValueError('wandb=True: the package is not there; '
                             'pip install wandb, or leave the flag out') from None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if Path(word).name.startswith('align') and word.endswith('.py'):
            raise ValueError(f'{word}: stage 1 is a program of its own: python -m align {word}')
    s, sources = configure(TrainConfig, argv)
    # one process alone keeps the folder: two runs in it would overwrite each other
    with processes(s) as device, Stop() as stop:
        first = rank_and_world()[0] == 0
        with locked(Path(s.out_dir) / '.lock') if first else nullcontext():
            train(s, sources, device, stop)


def train(s, sources, device, stop):
    """The whole story of a run, from its settings to its result."""
    # ---- the run
    run = Run(started=time.time())
    out_dir = Path(s.out_dir)
    saved = saved_run(s, FREE, stage='answer')  # stage 1 is align
    about = begin(s, device)
    print(echo(s, sources))
    settings = asdict(s)

    # ---- words and pictures
    rows = {split: read_rows(s.dataset, split) for split in splits_to_learn_from(s)}
    rows_sum = {split: of_split.sum.hexdigest() for split, of_split in rows.items()}
    unchanged(s, saved, 'dataset', rows_sum)
    check_rows(rows, s)
    start = read_start(s.init_from) if s.init_from and not saved else None
    tokenizer = open_tokenizer(tokenizer_state(rows['train'], s, saved, start))
    few_shapes = s.compile or uses_graphs(s, device)  # every new one is compiled or captured anew
    questions = {split: tokenized(of_split, tokenizer, s, s.truncate, few_shapes)
                 for split, of_split in rows.items()}
    encoders = {name: encoder_of_run(name, settings, saved).to(device) for name in encoder_names(settings)}
    fingerprints = {name: encoder.fingerprint() if getattr(s, name) else None
                    for name, encoder in encoders.items()}
    for name, fingerprint in fingerprints.items():
        unchanged(s, saved, name, fingerprint)
    if already_finished(saved, s):
        return
    # what it refuses is said before anything is encoded
    decoder = new_decoder(s, saved, tokenizer, encoders)

    # ---- model and optimizers; the average of the weights is what is judged
    model = torch.nn.ModuleDict(dict(decoder=decoder))
    config = decoder.config
    if s.train_decoder == 'projection':
        decoder.requires_grad_(False)
        new_parts(decoder).requires_grad_(True)
    for name, encoder in encoders.items():
        if is_trained(settings, name):
            model[name] = encoder.train().requires_grad_(True)
    if start:
        start_from(start, model, fingerprints)
    model = model.to(device)
    # a compiled model is not judged: its copy is, which `follow` keeps equal where there is no ema
    average = copy.deepcopy(model).requires_grad_(False).eval() if s.ema or s.compile else model
    judged = {name: average[name] if name in average else encoder for name, encoder in encoders.items()}
    # a frozen encoder's tokens come from the cache
    tokens_of = dict(train=ContextTokens(settings, encoders, rows['train'], device),
                     val=ContextTokens(settings, judged, rows['val'], device))
    if s.compile:
        compile_layers(model, device)  # only what is trained, not what is judged
    parameters = [p for p in model.parameters() if p.requires_grad]
    dtype = pick_dtype(s.dtype, device)
    optimizers = make_optimizers(parts_and_shares(model, s), s, dtype)
    autocast = autocast_to(dtype, device)
    guard = Guard(device, dtype, s.skip_bad_steps)
    counts = parameter_counts(model, encoders)
    chance = math.log(config.vocab_size)  # what a guess costs, in nats per token
    print('parameters | ' + ' | '.join(f'{name} {n:,}' for name, n in counts.items()))
    at_first = '' if s.decoder else f' | expected loss at the start {chance:.2f}'
    print(f'up to {s.batch_size * s.grad_accum} examples per step{at_first}')

    # ---- go on where a stopped run stood
    # the whole state: batches and passes follow from step and seed, and nothing in the model is random
    parts = dict(model=model, ema=average, scaler=guard)  # by the names that checkpoints have
    parts |= {f'optimizer {k}': optimizer for k, optimizer in enumerate(optimizers)}
    if saved:
        run = put_back(saved, parts, run.started)
        guard.allow(s.skip_bad_steps - run.bad_steps)
        say_where(s, saved, learning_rate)
    fixed_pictures = s.use_vision and not s.train_encoder
    fixed_tokens = partial(tokens_of['train'].of, 'encoder') if fixed_pictures else None
    checkpoint = dict(format=FORMAT, stage='answer', settings=settings, environment=about,
                      model_config=asdict(config), dataset_fingerprint=rows_sum, tokenizer=tokenizer.state,
                      seen=what_was_seen(rows['train'], fixed_tokens))
    for name, encoder in encoders.items():
        checkpoint |= {f'{name}_config': asdict(encoder.config), f'{name}_source': encoder.source,
                       f'{name}_fingerprint': fingerprints[name]}
    log = Log(out_dir / 'log.jsonl', run, s, dict(**about, parameters=counts, settings=settings))

    # ---- a step
    def learn(given, passes):
        """Forward, loss, backward, update: nothing in it waits for the device. given: [the batches, (3,):
        learning rate, rate of the average, 1.0 where this process was asked to stop]
        Shapes: -> (4,): loss, whether any process was asked to stop, norm of the gradient, whether the step
            was bad"""
        batches, numbers = on_device(given, device)
        lr, rate, asked = numbers                                      # () each
        loss = 0
        for batch in batches:
            with autocast:
                vision, sound = tokens_of['train'].encode(batch)       # (B, N, D), (B, M, D)
                _, mean = model['decoder'](vision, batch['question'], batch['answer'], batch['targets'],
                                           passes, sound)
                # a mean over targets: divided, or more micro-batches would make a larger gradient
                micro_loss = mean * batch.get('weight', 1) / s.grad_accum
            if micro_loss.requires_grad:  # a projection alone learns nothing of rows that it takes no part in
                guard.scaled(micro_loss).backward()
            loss = loss + micro_loss.detach()
        # here the processes meet: one gradient, and they stop at the same step
        loss, asked = all_reduce(parameters, torch.stack([loss, asked]))
        set_learning_rate(optimizers, lr)
        gnorm, skip, bad = update(parameters, optimizers, guard, loss, s.grad_clip)
        follow(average, model, rate * (1 - skip))
        return torch.stack([loss, asked, gnorm, bad])

    # ---- the loop
    if uses_graphs(s, device):
        learn = Captured(learn, device)
    batches_ahead = Ahead(partial(batches_of_step, draw=partial(draw, questions=questions['train'], s=s),
                                  fetch=tokens_of['train'].fetch, s=s, device=device), s.max_steps)
    save_now = partial(save, out_dir, checkpoint, run, parts)
    done = []  # steps whose results have not been read
    mark = time.time()
    warned = False
    stopping = False
    stop.waits = True  # from here on a signal lets the step end: what is saved is whole
    while True:
        if is_due(run.step, s) and run.validated < run.step:
            scores = evaluation.quick_scores(average['decoder'], questions['val'], tokens_of['val'], device,
                                             s.batch_size)
            log.line(run.step, dict(**scores, train_s=run.train_s + run.since_s, metric='em'), event='eval')
            if run.best is None or better(scores, run.best['scores'], rows['val']):
                weights = {name: copy.deepcopy(part.state_dict()) for name, part in average.items()}
                run.best = dict(step=run.step, scores=scores, **weights)
            run.validated = run.step
            save_now()
            mark = time.time()  # the clock of the log lines stands still while evaluating
        if stopping:
            end_early(run, s)
        if run.step >= s.max_steps:
            break

        batches, names, n_rows = batches_ahead(run.step)
        lr = learning_rate(run.step, s)
        numbers = torch.tensor([lr, ema_rate(run.step, s), stop.asked])        # (3,)
        results = learn([batches, pinned(numbers, device)], passes_of_step(run.step, s))   # (4,)
        done.append(dict(step=run.step, lr=lr, names=names, n_rows=n_rows, results=results))
        run.step += 1
        if reads_results(run.step, s, device, stop):  # always so where a log line is due
            stopping = read_results(done, ['answer'], run, log, s.skip_bad_steps, save_now)
        run.since_s += time.time() - mark
        mark = time.time()

        if run.since and (run.step % s.log_interval == 0 or run.step == s.max_steps):
            means = log.step(run, lr)
            if run.step >= 100 and not warned and means['answer'] > chance - .01:
                warned = True
                log.nothing_learnt(run.step, 'answer', means['answer'], chance)

        # saved before validating too: a crash there loses no step
        if stopping or is_due(run.step, s):
            save_now()
    stop.waits = False
    if stop.asked:
        raise KeyboardInterrupt('stopped before the evaluation, training is saved; '
                                'the same command goes on from there')
    del learn  # and the memory of its graphs

    # ---- the result on the test split, opened only now, with the weights that validation found best
    for name, part in average.items():
        part.load_state_dict(run.best[name])
    print(f"best validation em {run.best['scores']['em']:.3f} at step {run.best['step']}")
    run.wall_s = time.time() - run.started
    sizes = {key: getattr(config, key) for key in ('n_layer', 'n_head', 'n_embd')}  # perhaps pretrained
    facts = run.facts(device) | dict(parameters=counts, **about, settings=settings | sizes)
    facts |= dict(dataset_fingerprint=rows_sum, encoder_fingerprint=fingerprints.get('encoder'))
    flops = flops_per_row(model, tokens_of['train'], questions['train'], s)
    facts |= dict(mflop_per_example=flops / 1e6, curve=validation_curve(out_dir))
    judge_test_split(average['decoder'], judged, tokenizer, s, device, facts)
    print(f'{out_dir}: done after {clock(time.time() - run.started)}, '
          f'at most {most_memory(device) / 1e9:.2f} GB of memory')


# ----------------------------------------------------------------------------
# what the story leans on

def is_due(step, s):
    """Whether the run is saved, and validated, after so many steps."""
    return step % s.eval_interval == 0 or step == s.max_steps


def reads_results(step, s, device, stop):
    """Whether the host now waits for the results of its steps: on a CPU always, where that costs nothing; on
    a GPU at log lines, before saving, and when a lone process is to stop."""
    on_gpu = device.startswith('cuda')
    return not on_gpu or step % s.log_interval == 0 or is_due(step, s) or (stop.asked and alone())


def uses_graphs(s, device):
    """Whether steps are CUDA graphs: on one GPU; here a graph holds no exchange between processes, and
    nothing compiled."""
    return s.graphs and device.startswith('cuda') and alone() and not s.compile


def draw(k, questions, s):
    """-> the k-th batch of a run, and names of some of its rows."""
    chosen = questions.rows_of_step(k, s.batch_size, s.seed)
    batch = questions.batch(chosen)
    batch['counted'] = batch['targets'] >= 0  # by which `shard` weighs the processes
    return batch, [questions.rows.sample_id[i] for i in chosen[:8]]


def passes_of_step(step, s):
    """The passes of a training step. Without min_inner_steps None, which stands for inner_steps; with it that
    many in the first steps, a share of draw_after, and then a number drawn by (seed, step).

    A share of (min_inner_steps / k)^2 of the draws is k or more: deep steps are rare, so they cost little.
    """
    if s.min_inner_steps is None:
        return None
    if step < s.draw_after * s.max_steps:  # what passes are for is learnt sooner while they do not change
        return s.min_inner_steps
    u = 1 - random.Random(f'{s.seed}/{step}').random()                 # in (0, 1]
    return min(s.inner_steps, int(s.min_inner_steps / u ** .5))


def mean_passes(s):
    """The mean of `passes_of_step` over the steps of a run with min_inner_steps."""
    deeper = range(s.min_inner_steps + 1, s.inner_steps + 1)
    more = sum((s.min_inner_steps / k) ** 2 for k in deeper)
    return s.min_inner_steps + (1 - s.draw_after) * more


def splits_to_learn_from(s):
    """-> ('train', 'val'); the test split is not read before the end, but there. Raises: ValueError."""
    if Path(s.dataset).resolve() == Path(ShapesConfig().out).resolve():
        in_turn(draw_if_missing)
    check_splits(s.dataset)
    return 'train', 'val'


def check_rows(rows, s):
    """Says where there are few questions to validate on, and where sounds are left out. Raises: ValueError
    where none is there to be heard."""
    say_if_few(len(rows['val']), 'questions')
    if len(rows['train'].sounds) and not s.use_sound:
        print(f"{s.dataset} has sounds, which are not heard: use_sound=False")
    if s.use_sound and not len(rows['train'].sounds):
        raise ValueError(f'dataset={s.dataset}: no training row has a sound, and use_sound=True; give '
                         'a dataset with a column sound, or leave the flag out')


def draw_if_missing():
    shapes = ShapesConfig()
    if not Path(shapes.out).exists():
        with suppress(FileExistsError):  # another run was faster
            draw_shapes(shapes)


def tokenizer_state(rows, s, saved, start):
    """The state of a tokenizer: that of the run that goes on or is started from; else a pretrained decoder's,
    gpt2, or a BPE trained on the questions and first answers of `rows`."""
    if saved:
        return saved['tokenizer']
    if start:
        return with_prompt(start['tokenizer'], s.prompt) if s.prompt else start['tokenizer']
    if s.decoder:
        return with_prompt(read_tokenizer(found_folder(s.decoder)), s.prompt)
    if s.tokenizer == 'gpt2':
        return {'name': 'gpt2'}
    texts = (text for question, references, *_ in rows.texts for text in (question, references[0]))
    return train_bpe(texts, s.vocab_size)


def tokenized(rows, tokenizer, s, truncate, few_shapes=False):
    return Questions(rows, tokenizer, s.max_question_tokens, s.max_answer_tokens, truncate, few_shapes)


def new_decoder(s, saved, tokenizer, encoders):
    """The decoder, with fresh or pretrained weights; those of a run that goes on come from its checkpoint.
    Raises: ValueError."""
    given = dict(pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, vision_dim=1)
    if 'encoder' in encoders:
        c = encoders['encoder'].config
        if s.vision_dim and s.vision_dim not in c.prefixes:
            raise ValueError(f'vision_dim={s.vision_dim}: expected one of the prefixes of the encoder, '
                             f'{c.prefixes}')
        given['vision_dim'] = s.vision_dim or c.vision_dim
    if 'sound_encoder' in encoders:
        given['sound_dim'] = encoders['sound_encoder'].config.vision_dim
    if not s.decoder:
        return build_model(s.model_config(**given, vocab_size=tokenizer.vocab_size))
    if saved:
        return build_model(ModelConfig(**saved['model_config']))
    decoder = Decoder.from_pretrained(s.decoder, **s.model_settings() | given)
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ValueError(f'{s.decoder}: its tokenizer has {tokenizer.vocab_size} tokens, its weights have '
                         f'{decoder.config.vocab_size}')
    return decoder


def new_parts(decoder):
    """What a pretrained decoder has beside its own weights: its ways from pictures and sounds, and what
    passes need."""
    modules = decoder.projections().values()
    single = [getattr(decoder, name) for name in ('gates', 'z_start') if hasattr(decoder, name)]
    return torch.nn.ModuleList([*modules, torch.nn.ParameterList(single)])


def parts_and_shares(model, s):
    """What is trained, and its share of the learning rate: a parameter in two belongs to the first."""
    shares = dict(encoder=s.encoder_lr, decoder=s.decoder_lr, sound_encoder=1.0)
    parts = [(shares[name], part) for name, part in model.items()]
    if s.decoder:
        parts.insert(0, (1.0, new_parts(model['decoder'])))
    return parts


def parameter_counts(model, encoders):
    """Parameters by part, those of the encoders beside them."""
    counts = model['decoder'].parameter_counts() | dict(encoder=0)
    for name, encoder in encoders.items():
        counts[name] = sum(p.numel() for p in encoder.parameters())
    return counts


def better(new, old, rows):
    """Whether a validation is the best so far: by the em of the questions, by loss where all are captions."""
    if all(type == 'describe' for type in rows.type):
        return new['loss'] <= old['loss']
    return new['em'] >= old['em']  # of equals the later one, which has learnt longer


def flops_per_row(model, tokens_of, questions, s, n=16):
    """FLOPs of a training step for each row of a full batch, without the optimizer's own.

    The mean over the sizes of batches (captions come in smaller ones), weighted by how often they come, of
    `n` batches each. All rows of a batch cost the same, so one is counted.
    """
    batches = {}
    for rows in questions.epoch(s.batch_size, s.seed, 0):
        batches.setdefault(len(rows), []).append(rows)
    known = {}  # by shape, on which alone it depends

    def one_row(batch, passes=None):
        vision, sound = tokens_of(batch)
        decoder = model['decoder']
        _, loss = decoder(vision, batch['question'], batch['answer'], batch['targets'], passes, sound)
        if loss.requires_grad:
            loss.backward()

    def flops_of_batch(batch):
        if s.min_inner_steps is None:
            return flops_of(partial(one_row, batch))
        one, two = (flops_of(partial(one_row, batch, passes)) for passes in (1, 2))
        return one + (mean_passes(s) - 1) * (two - one)  # every further pass costs the same

    def flops_of_one(rows):
        batch = on_device(questions.batch(rows), next(model.parameters()).device)
        batch = {key: value[:1] for key, value in batch.items()}
        has = batch['picture'].item() >= 0, batch['sound'].item() >= 0
        shape = batch['question'].shape + batch['answer'].shape + has
        if shape not in known:
            known[shape] = flops_of_batch(batch)
        return known[shape]

    total = 0
    n_batches = 0
    for size, of_size in batches.items():
        counted = of_size[:n]
        total += len(of_size) * size * sum(map(flops_of_one, counted)) / len(counted)
        n_batches += len(of_size)
    return total / n_batches / s.batch_size


def judge_test_split(decoder, encoders, tokenizer, s, device, facts):
    """Evaluates the test split and writes the results."""
    rows = read_rows(s.dataset, 'test')
    writer = writer_of(decoder, device) if s.graphs else None
    # too late to refuse what is too long
    questions = tokenized(rows, tokenizer, s, truncate=True, few_shapes=writer is not None)
    tokens_of = ContextTokens(asdict(s), encoders, rows, device)
    batch_size = min(256, s.batch_size)  # training had the memory for it
    metrics, predictions = evaluation.evaluate(decoder, questions, tokens_of, device, batch_size,
                                               writer=writer)
    metrics['dataset_fingerprint'] = facts['dataset_fingerprint'] | dict(test=rows.sum.hexdigest())
    print(result_table(metrics))
    write_results(s.out_dir, facts | metrics, rows, predictions)


# ----------------------------------------------------------------------------
# the schedule

def learning_rate(step, s):
    """Linear warm-up, then a cosine from the peak to min_lr_ratio of it."""
    warmup = max(1, round(s.warmup_ratio * s.max_steps))
    if step < warmup:  # + 1: a first step at rate 0 would be wasted
        return s.learning_rate * (step + 1) / warmup
    t = (step - warmup) / max(1, s.max_steps - warmup)
    return s.learning_rate * (s.min_lr_ratio + (1 - s.min_lr_ratio) * (1 + math.cos(math.pi * t)) / 2)


def ema_rate(step, s):
    """How far the average moves towards the weights; early on more, so that it never lags far."""
    return 1 - min(s.ema, (1 + step) / (10 + step))


if __name__ == '__main__':
    run_script(main, GOES_ON)
