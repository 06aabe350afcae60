"""
Training, both stages, one loop.

    python train.py config/trm.py                      # stage 'answer': a decoder learns to answer questions about pictures
    python train.py config/trm.py --inner_steps=8      # any setting, overridden; --help lists them
    python train.py config/align.py                    # stage 'align': the encoder learns from captions
    python train.py config/trm.py --compile=true

    torchrun --standalone --nproc_per_node=4 train.py config/trm.py   # the same run, shared by four processes

The same command goes on where a stopped or killed run stood, to the same result. A run folder gets ckpt.pt, log.jsonl, metrics.json and pictures.
"""

import copy
import importlib
import math
import platform
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

import eval as evaluation
from configurator import configure, echo, expect
from data import Questions, Tokenizer, read_rows, train_bpe
from model import ModelConfig, build_model
from plumbing.console import clock, printable, run_script
from plumbing.files import locked, write_whole
from plumbing.machine import (
    commit,
    compile_layers,
    device_name,
    flops_of,
    keep_freed_memory,
    most_memory,
    pick_dtype,
)
from plumbing.ranks import all_reduce, processes, shard
from plumbing.run import Log, Run, Stop
from plumbing.tables import check_splits
from prepare.shapes import Config as ShapesConfig
from prepare.shapes import draw_shapes

ALIGN = ('objective', 'captions', 'max_objects', 'trunk', 'image_px', 'encoder_width', 'encoder_layers', 'pool', 'adapter', 'n_latents', 'perceiver_layers',
         'perceiver_width', 'perceiver_heads', 'encoder_dim', 'prefixes', 'text_width', 'text_layers')  # settings of stage align alone
ANSWER = ('encoder', 'train_encoder', 'encoder_lr', 'vision_dim', 'max_question_tokens', 'max_answer_tokens', 'truncate', 'kind', 'n_layer', 'n_head', 'n_embd',
          'recursion', 'inner_steps', 'outer_steps', 'shared', 'deep_supervision', 'checkpoint_recursion', 'norm', 'use_vision', 'prefix_lm', 'tokenizer')  # of stage answer alone
FREE = ('fresh', 'out_dir', 'device', 'compile', 'log_interval', 'wandb', 'skip_bad_steps', 'cache_dir')  # what is learnt is the same whatever these are, but for rounding


@dataclass
class TrainConfig:
    # the run
    stage: str = 'answer'                     # answer: train a decoder; align: train the encoder against captions
    out_dir: str = 'out/trm'                  # folder for everything that the run writes
    fresh: bool = False                       # start over even if out_dir holds a run
    seed: int = 1337                          # of the weights and the batches
    device: str = 'auto'                      # auto (a GPU if there is one), cpu, cuda, ...
    dtype: str = 'auto'                       # of the matrix products: float32, bfloat16, float16, or auto: bfloat16 where it is fast
    deterministic: bool = False               # only operations that give the same bits every time, on a GPU too; slower there
    compile: bool = False                     # torch.compile: minutes of compiling, for runs that are long enough to earn them back
    log_interval: int = 50                    # steps between log lines
    eval_interval: int = 300                  # steps between validations, each followed by a checkpoint
    wandb: bool = False                       # log to Weights & Biases too (pip install wandb)
    # pictures and words
    dataset: str = 'data/shapes'              # folder with train, val and test.parquet; data/shapes is drawn if it is missing
    cache_dir: str = 'data/cache'             # where encoded pictures are kept
    cache: bool = True                        # keep encoded pictures there; false: decode and encode them anew in every step
    encoder: str = 'assets/encoder_shapes.pt' # the frozen encoder: this project's file, or CLIP, or a checkpoint of Edge-Glass
    encoder_px: int | None = None             # side of the pictures it gets, in pixels; None: as it was made for
    fit: str | None = None                    # how pictures become square: crop, squash or pad; None: as it was made for
    upright: bool | None = None               # turn photographs as their EXIF orientation says; None: as it was made for
    activation: str | None = None             # of CLIP, quick_gelu or gelu; None: what its files say
    train_encoder: bool = False               # train the encoder along instead of freezing it
    vision_dim: int | None = None             # Matryoshka: read only so many dimensions of a token; None: all
    tokenizer: str = 'bpe'                    # bpe: trained on the training questions and answers; gpt2
    vocab_size: int = 512                     # of the bpe, at most
    max_question_tokens: int = 32             # a longer question is an error, or cut with truncate
    max_answer_tokens: int = 64               # the same for the answer, <eos> included
    truncate: bool = False                    # cut what is too long
    # the decoder, see model.ModelConfig
    kind: str = 'trm'                         # plain or trm
    n_layer: int = 2                          # blocks in the network
    n_head: int = 4                           # attention heads
    n_embd: int = 128                         # width
    recursion: str = 'concat'                 # concat: [y ; z] together; add: x + y + z; loop: y alone, without z
    inner_steps: int = 4                      # steps of a cycle
    outer_steps: int = 1                      # cycles
    shared: bool = True                       # the steps share their blocks; false: each has n_layer of its own
    deep_supervision: bool = False            # every cycle is trained on; false: the last one only
    checkpoint_recursion: bool = False        # recompute the steps in the backward pass: less memory, more time
    norm: str = 'pre'                         # pre, post, or unbounded: where the norms are, see model.ModelConfig
    use_vision: bool = True                   # false: the blind control
    prefix_lm: bool = True                    # the context sees itself both ways; false: causally
    # the encoder, in stage align; see encoder.EncoderConfig
    objective: str = 'both'                   # what it is trained on: contrast, cloze or both
    captions: str = 'drawn'                   # drawn: pictures of shapes with captions, as they are needed; dataset: those of the dataset
    max_objects: int = 6                      # objects in a drawn picture, at most
    trunk: str | None = None                  # the encoder (CLIP) whose trunk is taken over and frozen; None: a small one, trained too
    image_px: int = 64                        # side of the picture, without a trunk
    encoder_width: int = 128                  # width, without a trunk
    encoder_layers: int = 2                   # layers, without a trunk
    pool: int = 1                             # the trunk's patches are averaged pool x pool
    adapter: str = 'none'                     # between trunk and resampler: none, linear or mlp
    n_latents: int = 16                       # tokens of a picture
    perceiver_layers: int = 2                 # layers of the resampler
    perceiver_width: int | None = None        # of the resampler; None: the trunk's
    perceiver_heads: int = 4                  # attention heads of the resampler
    encoder_dim: int = 128                    # dimensions of a token
    prefixes: str | None = None               # the Matryoshka prefixes, separated by commas; None: an eighth, a quarter, a half, all
    text_width: int = 128                     # width of the text tower
    text_layers: int = 1                      # layers of the text tower
    # the optimizer
    optimizer: str = 'muon'                   # muon: Muon on the layers' matrices and AdamW on the rest; adamw: on everything
    max_steps: int = 1800                     # optimizer steps
    batch_size: int = 128                     # rows in a forward pass, fewer where answers have more than 8 tokens
    grad_accum: int = 1                       # forward passes in an optimizer step
    learning_rate: float = 2e-3               # at its peak
    encoder_lr: float = 1.0                   # what an encoder that is trained along takes of it, as a fraction
    min_lr_ratio: float = 0.1                 # of the peak, at the end of the cosine
    warmup_ratio: float = 0.05                # of the steps
    weight_decay: float = 0.05                # on matrices only
    beta1: float = 0.9                        # of AdamW
    beta2: float = 0.95                       # of AdamW
    momentum: float = 0.95                    # of Muon
    grad_clip: float = 1.0                    # largest norm of the gradient; 0: no limit
    skip_bad_steps: int = 0                   # leave out so many steps whose loss or gradient is not finite before stopping
    ema: float = 0.998                        # decay of the averaged weights, which are what is evaluated; 0: the raw ones

    def __post_init__(self):
        expect(self, stage=('answer', 'align'), optimizer=('muon', 'adamw'), dtype=('auto', 'float32', 'bfloat16', 'float16'), tokenizer=('bpe', 'gpt2'),
               captions=('drawn', 'dataset'), objective=('contrast', 'cloze', 'both'))
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) in (int, float) and value <= 0 and f.name not in ('seed', 'grad_clip', 'skip_bad_steps', 'ema', 'weight_decay',
                                                                            'min_lr_ratio', 'warmup_ratio', 'beta1', 'beta2', 'momentum'):
                raise ValueError(f'{f.name}={value}: expected more than 0')
        if self.grad_clip < 0 or self.skip_bad_steps < 0:
            raise ValueError(f'grad_clip={self.grad_clip}, skip_bad_steps={self.skip_bad_steps}: expected 0 or more')
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f'min_lr_ratio={self.min_lr_ratio}: expected between 0 and 1')
        for key in ('ema', 'warmup_ratio', 'beta1', 'beta2', 'momentum', 'weight_decay'):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: expected at least 0 and less than 1')
        if self.tokenizer == 'bpe' and self.vocab_size < 259:
            raise ValueError(f'vocab_size={self.vocab_size}: expected at least 259, the bytes and three marks')
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f'seed={self.seed}: expected 0 to 2^63 - 1')
        if self.wandb:
            try:
                importlib.import_module('wandb')
            except ImportError:
                raise ValueError('wandb=True: the package is not there; pip install wandb, or leave the flag out') from None
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.stage == 'answer' and (idle := [key for key in changed if key in ALIGN]):
            raise ValueError(f'{", ".join(idle)}: of stage align; here the encoder is what --encoder names')
        if self.stage == 'align' and (idle := [key for key in changed if key in ANSWER]):
            raise ValueError(f'{", ".join(idle)}: of stage answer; an alignment trains the encoder alone')
        if self.stage == 'align' and self.captions == 'drawn' and 'dataset' in changed:
            raise ValueError(f'dataset={self.dataset} with captions=drawn: pictures are drawn as they are needed; give --captions=dataset')
        if self.trunk and (idle := [key for key in changed if key in ('image_px', 'encoder_width', 'encoder_layers')]):
            raise ValueError(f'{", ".join(idle)}: of an encoder without a trunk; the trunk has sizes of its own (--encoder_px is the side of its pictures)')
        if self.trunk and self.captions == 'drawn':
            raise ValueError('trunk with captions=drawn: a pretrained trunk reads the pictures of a dataset; give --captions=dataset')
        if self.stage == 'align' and self.encoder_px and not self.trunk:
            raise ValueError('encoder_px without a trunk: the side of the pictures is then --image_px')
        if self.encoder_lr != 1 and not self.train_encoder:
            raise ValueError(f'encoder_lr={self.encoder_lr}: the encoder is frozen; give --train_encoder=true')
        if self.train_encoder and not self.use_vision:
            raise ValueError('train_encoder=True with use_vision=False: there is no picture to train the encoder on')
        if self.stage == 'answer':
            self.model_config(vision_dim=1)  # bad sizes are said now, not after the pictures are encoded

    def model_config(self, **more):
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig) if hasattr(self, f.name)} | more)


class AnswerTask:
    """Stage 2: a decoder learns to answer. What the loop needs to know of it; the encoder is frozen unless `train_encoder`."""
    metric = 'em'  # what the curves show of validation

    def __init__(self, settings, device, saved):
        self.settings, self.device = settings, device
        if settings.dataset == 'data/shapes':
            evaluation.in_turn(draw_if_missing)
        check_splits(settings.dataset)  # the test split is not read before the end
        rows = {split: read_rows(settings.dataset, split) for split in ('train', 'val')}
        if saved:
            self.tokenizer = Tokenizer(saved['tokenizer'])
        elif settings.tokenizer == 'gpt2':
            self.tokenizer = Tokenizer({'name': 'gpt2'})
        else:
            texts = (text for question, references, *_ in rows['train'].texts for text in (question, references[0]))
            self.tokenizer = Tokenizer(train_bpe(texts, settings.vocab_size))
        self.questions = {split: self.tokenized(r, settings.truncate) for split, r in rows.items()}
        self.rows_sum = {split: r.sum.hexdigest() for split, r in rows.items()}
        unchanged(settings, saved, 'dataset', self.rows_sum)

        encoder = evaluation.open_encoder(settings.encoder, asdict(settings)).to(device) if settings.use_vision else None
        if encoder and settings.vision_dim and settings.vision_dim not in encoder.config.prefixes:
            raise ValueError(f'vision_dim={settings.vision_dim}: expected one of the prefixes of the encoder, {encoder.config.prefixes}')
        self.fingerprint = encoder.fingerprint() if encoder else None
        unchanged(settings, saved, 'encoder', self.fingerprint)
        self.vision = {split: evaluation.vision_source(asdict(settings), encoder, r, device) for split, r in rows.items()}
        self.frozen = None if settings.train_encoder else encoder

        t = self.tokenizer
        D = (settings.vision_dim or encoder.config.vision_dim) if encoder else 1
        self.config = settings.model_config(vocab_size=t.vocab_size, pad_id=t.pad_id, bos_id=t.bos_id, eos_id=t.eos_id, vision_dim=D)
        self.model = torch.nn.ModuleDict(dict(decoder=build_model(self.config)))
        self.encoder_config = asdict(encoder.config) if encoder else None
        if settings.train_encoder:
            self.model['encoder'] = encoder.train().requires_grad_(True)

    def tokenized(self, rows, truncate):
        s = self.settings
        return Questions(rows, self.tokenizer, s.max_question_tokens, s.max_answer_tokens, truncate, few_shapes=s.compile)

    def chance(self):
        """What every loss is, about, before anything is learnt."""
        return {'answer': math.log(self.config.vocab_size)}

    def batch(self, step):
        questions = self.questions['train']
        rows = questions.rows_of_step(step, self.settings.batch_size, self.settings.seed)
        batch = questions.batch(rows)
        return batch | dict(names=lambda: [questions.rows.sample_id[i] for i in rows[:8]], counted=batch['targets'] >= 0)

    def losses(self, model, batch):
        """-> a dict of losses whose sum is trained on."""
        vision = self.vision_of(model, 'train')(batch['picture'])
        return {'answer': model['decoder'](vision, batch['question'], batch['answer'], batch['targets'])[1] * batch.get('weight', 1)}

    def encoder_of(self, model):
        return model['encoder'] if 'encoder' in model else self.frozen

    def vision_of(self, model, split):
        return partial(self.vision[split], self.encoder_of(model))

    def validate(self, model):
        return evaluation.quick_scores(model['decoder'], self.questions['val'], self.vision_of(model, 'val'), self.device)

    def better(self, new, old):
        captions = all(type == 'describe' for type in self.questions['val'].rows.type)  # they count for the loss only
        return new['loss'] <= old['loss'] if captions else new['em'] >= old['em']

    def weights(self, model):
        return {name: module.state_dict() for name, module in model.items()}

    def state(self):
        """What the checkpoint holds beside weights and optimizer."""
        return dict(model_config=asdict(self.config), encoder_config=self.encoder_config, encoder_fingerprint=self.fingerprint,
                    dataset_fingerprint=self.rows_sum, tokenizer=self.tokenizer.state)

    def parameter_counts(self):
        encoder = self.encoder_of(self.model)
        return self.model['decoder'].parameter_counts() | {'encoder': sum(p.numel() for p in encoder.parameters()) if encoder else 0}

    def flops(self, n=4):
        """FLOPs of a training step, forwards and backwards, for each row of a full batch; of the decoder and of whatever encodes in every step, without the
        optimizer's own. The mean over the kinds of batches (captions come in smaller ones), weighted by how often they come, of `n` batches each. All rows of
        a batch cost the same, so one is counted."""
        kinds = {}
        for rows in self.questions['train'].epoch(self.settings.batch_size, self.settings.seed, 0):
            kinds.setdefault(len(rows), []).append(rows)

        def one_row(rows):
            batch = evaluation.on_device(self.questions['train'].batch(rows), self.device)
            sum(self.losses(self.model, {key: t[:1] for key, t in batch.items()}).values()).backward()

        mean = {kind: kind * sum(flops_of(partial(one_row, rows)) for rows in batches[:n]) / len(batches[:n]) for kind, batches in kinds.items()}
        return sum(len(kinds[kind]) * mean[kind] for kind in kinds) / sum(map(len, kinds.values())) / self.settings.batch_size

    def finish(self, model, facts):
        """Evaluates the test split, which nothing has looked at so far, and writes the results."""
        rows = read_rows(self.settings.dataset, 'test')
        questions = self.tokenized(rows, truncate=True)  # too late to refuse what is too long
        facts |= dict(mflop_per_example=self.flops() / 1e6, curve=evaluation.validation_curve(self.settings.out_dir))
        self.vision['test'] = evaluation.vision_source(asdict(self.settings), self.encoder_of(model), rows, self.device)
        metrics, predictions = evaluation.evaluate(model['decoder'], questions, self.vision_of(model, 'test'), self.device)
        print(evaluation.result_table(metrics))
        evaluation.write_results(self.settings.out_dir, facts | metrics, rows, predictions)


def main(argv=None):
    settings, sources = configure(TrainConfig, sys.argv[1:] if argv is None else argv)
    with processes(settings) as device, Stop() as stop:
        with locked(Path(settings.out_dir) / '.lock') if evaluation.rank_and_world()[0] == 0 else nullcontext():
            train(settings, sources, device, stop)


def train(settings, sources, device, stop):
    # ---- the run
    run, out_dir, saved = Run(started=time.time()), Path(settings.out_dir), saved_run(settings)
    if len(set(evaluation.from_all(saved and saved['run']['step']))) > 1:
        raise ValueError(f'out_dir={out_dir}: the processes do not all see the same run there; it must lie on a disk that they share')
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(settings.deterministic)
    about = dict(commit=commit(), torch=str(torch.__version__), python=platform.python_version(), device=device_name(device),
                 processes=evaluation.rank_and_world()[1], threads=torch.get_num_threads(), seed=settings.seed)
    print(' | '.join(f'{k} {v}' for k, v in about.items()))
    print(echo(settings, sources))

    # ---- data and model
    task = (AnswerTask if settings.stage == 'answer' else AlignTask)(settings, device, saved)
    learner = Learner(task, settings, device)
    print('parameters | ' + ' | '.join(f'{k} {n:,}' for k, n in task.parameter_counts().items()))
    print(f'up to {settings.batch_size * settings.grad_accum} examples per step | expected loss at the start {sum(task.chance().values()):.2f}')

    # ---- go on where a stopped run stood
    if saved:
        for group in saved['state']['optimizer 0']['param_groups']:
            group['fused'] = learner.optimizers[0].defaults['fused']  # the run may have begun on another device
        for name, part in learner.parts.items():
            part.load_state_dict(saved['state'][name])
        run = Run(**saved['run'] | dict(started=run.started - saved['run']['wall_s']))
        print(f'going on at step {run.step}', flush=True)

    def save():
        run.wall_s = time.time() - run.started
        checkpoint = dict(format=evaluation.FORMAT, stage=settings.stage, state={name: part.state_dict() for name, part in learner.parts.items()},
                          run=vars(run), settings=asdict(settings), environment=about, **task.state())
        evaluation.in_turn(lambda: write_whole(out_dir / 'ckpt.pt', partial(torch.save, checkpoint)))  # nobody goes on, or ends, before it is there

    task.batch(run.step * settings.grad_accum)  # a bad setting, a batch that is too large, say, shows now and costs nobody the old run
    if settings.fresh and evaluation.rank_and_world()[0] == 0:
        for name in ('ckpt.pt', 'metrics.json', 'encoder.pt', 'predictions.jsonl', 'vqav2_results.json', 'samples.png', 'curves.png'):
            (out_dir / name).unlink(missing_ok=True)
    log = Log(out_dir / 'log.jsonl', run.step, settings)
    log.write(dict(event='start', step=run.step, **about, parameters=task.parameter_counts(), settings=asdict(settings)))

    # ---- the loop
    mark, warned, stop.waits = time.time(), False, True
    while run.step < settings.max_steps:
        lr = learning_rate(run.step, settings)
        losses, rows, gnorm, stopping, problem = learner.step(run.step, lr, stop.asked)
        if not problem:
            run.total, run.since, run.rows = {key: run.total.get(key, 0) + value for key, value in losses.items()}, run.since + 1, run.rows + rows
        else:
            if run.bad_steps >= settings.skip_bad_steps:
                save()
                raise FloatingPointError(f'{problem}; the state before this step is saved; a lower --learning_rate with --fresh=true is the usual remedy, '
                                         f'--skip_bad_steps={run.bad_steps + 10} leaves such steps out')
            run.bad_steps += 1
            print(f'{problem}; left out')
            log.write(dict(event='bad step', step=run.step + 1, problem=problem))
        run.step += 1
        run.since_s, mark = run.since_s + time.time() - mark, time.time()

        if run.since and (run.step % settings.log_interval == 0 or run.step == settings.max_steps):
            run.train_s += run.since_s
            parts = {key: value / run.since for key, value in run.total.items()}
            log.line(run.step, dict(loss=sum(parts.values()), **(parts if len(parts) > 1 else {}), lr=lr, gnorm=gnorm, ms=1e3 * run.since_s / run.since,
                                    examples_per_s=run.rows / run.since_s, train_s=run.train_s))
            for key, chance in task.chance().items():
                if run.step >= 100 and not warned and parts.get(key, 0) > chance - .01:
                    warned = True
                    print(f'step {run.step}: the loss {key} is {parts[key]:.3f} and was to fall below {chance:.3f}, what a guess costs: nothing is '
                          f'learnt yet; a lower --learning_rate is the usual remedy')
            run.total, run.since, run.since_s, run.rows = {}, 0, 0.0, 0

        if run.step % settings.eval_interval == 0 or run.step == settings.max_steps:
            scores = task.validate(learner.average)
            log.line(run.step, dict(**scores, train_s=run.train_s + run.since_s, metric=task.metric), event='eval')
            if run.best is None or task.better(scores, run.best['scores']):
                run.best = dict(step=run.step, scores=scores, **copy.deepcopy(task.weights(learner.average)))
            save()
            mark = time.time()  # the clock of the log lines stands still while evaluating
        elif stopping:
            save()
        if stopping:
            raise KeyboardInterrupt(f'stopped at step {run.step} of {settings.max_steps}, which is saved; the same command'
                                    f'{" without --fresh" * settings.fresh} goes on from there')
    stop.waits = False
    if stop.asked:
        raise KeyboardInterrupt('stopped before the evaluation, training is saved; the same command goes on from there')

    # ---- the result, with the weights that were best in validation
    for name, weights in task.weights(learner.average).items():
        for key, tensor in weights.items():
            tensor.copy_(run.best[name][key])
    print(f"best validation {task.metric} {run.best['scores'][task.metric]:.3f} at step {run.best['step']}")
    run.wall_s = time.time() - run.started
    task.finish(learner.average, facts(settings, task, run, about))
    print(f'{out_dir}: done after {clock(time.time() - run.started)}, at most {most_memory(device) / 1e9:.2f} GB of memory')


# ----------------------------------------------------------------------------
# what the story leans on

class Learner:
    """A task's model and what trains it: optimizers, the scale of float16's loss, and the average of the weights, which is what is judged."""

    def __init__(self, task, settings, device):
        self.task, self.settings, self.device, self.model = task, settings, device, task.model.to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval() if settings.ema or settings.compile else self.model
        if settings.compile:  # only what is trained, not what is judged
            compile_layers(self.model, device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(self.model, settings)
        kind, dtype = device.split(':')[0], pick_dtype(settings.dtype, device)
        self.autocast = torch.autocast(kind, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
        self.parts = dict(model=self.model, ema=self.average, scaler=self.scaler) | {f'optimizer {k}': o for k, o in enumerate(self.optimizers)}  # the whole state

    def step(self, step, lr, stop):
        """An optimizer step -> the mean losses, a dict of floats; rows; the gradient's norm; whether any process was asked to `stop`; and None, or, where
        loss or gradient is not finite and nothing has moved, a text that says so."""
        s, losses, names, rows = self.settings, {}, [], 0
        for group in sum((optimizer.param_groups for optimizer in self.optimizers), []):
            group['lr'] = lr * group['share']
        for k in range(s.grad_accum):
            batch = self.task.batch(step * s.grad_accum + k)
            rows, names, batch = rows + len(batch['counted']), [*names, batch.pop('names')], shard(batch)
            with self.autocast:
                parts = self.task.losses(self.model, evaluation.on_device(batch, self.device))
            self.scaler.scale(sum(parts.values()) / s.grad_accum).backward()
            for key, value in parts.items():
                losses[key] = losses.get(key, 0) + value.detach() / s.grad_accum
        losses, stopping = all_reduce(self.parameters, losses, stop)
        loss = sum(losses.values())
        gnorm, good = update(self.parameters, self.optimizers, self.scaler, loss, s.grad_clip)
        if not good:
            names = ', '.join(name for some in names for name in some())
            return losses, rows, gnorm, stopping, printable(f'step {step}: loss {loss}, gradient norm {gnorm}, lr {lr:.2e}: not finite; samples {names}, ...')
        if self.average is not self.model:  # early on a shorter average, so that it never lags behind
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - min(s.ema, (1 + step) / (10 + step)))
        return losses, rows, gnorm, stopping, None


def update(parameters, optimizers, scaler, loss, grad_clip):
    """A step of all optimizers with the clipped gradient -> its norm, and whether all is well. Where loss or gradient is not finite no weight moves; of
    float16 that is well now and then, while the loss is finite and the loss scale can be lowered."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gnorm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()
    finite, scale = math.isfinite(loss + gnorm), scaler.get_scale()
    for optimizer in optimizers if finite else ():
        scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return gnorm, finite or scaler.is_enabled() and math.isfinite(loss) and scale > 1


def draw_if_missing():
    shapes = ShapesConfig()
    if not Path(shapes.out).exists():
        with suppress(FileExistsError):  # another run was faster
            draw_shapes(shapes)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a matrix moves as far along the directions that its gradient rarely points to as along the others.

    For the matrices of linear layers. In float32, where torch.optim.Muon always takes bfloat16, which many CPUs only emulate.
    Source: Jordan 2024, kellerjordan.github.io/posts/muon; the scale, with which AdamW's learning rates fit, Liu 2025, arXiv 2502.16982.
    """

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group['params'] if p.grad is not None):
                if 'average' not in self.state[p]:
                    self.state[p]['average'] = torch.zeros_like(p)
                average = self.state[p]['average']
                average.lerp_(p.grad, 1 - group['momentum'])
                update = orthogonal(p.grad.lerp(average, group['momentum']))  # Nesterov: the gradient looks one step ahead
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update, alpha=-group['lr'] * .2 * max(p.shape) ** .5)  # RMS of the step: .2 lr, about AdamW's


def orthogonal(g):
    """The matrix with the singular vectors of g and singular values near 1 (.7 to 1.2; tiny ones less), by Newton and Schulz's iteration."""
    x = g.float() if g.size(0) <= g.size(1) else g.float().T  # the smaller side first: the products are smaller
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T                                                   # x <- 3.4445 x - 4.7750 a x + 2.0315 a a x
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if g.size(0) <= g.size(1) else x.T


def make_optimizers(model, settings):
    """-> [AdamW], or [AdamW, Muon], which then has the matrices of the linear layers. Weight decay is on matrices only; a group's learning rate is
    its `share` of that of the step."""
    linear, embeddings = ({m.weight for m in model.modules() if isinstance(m, kind)} for kind in (torch.nn.Linear, torch.nn.Embedding))
    muon = linear - embeddings if settings.optimizer == 'muon' else set()
    parts = [(1.0, model['decoder']), (settings.encoder_lr, model['encoder'])] if settings.train_encoder and settings.stage == 'answer' else [(1.0, model)]
    groups, matrices = [], []
    for share, part in parts:
        trained = [p for p in part.parameters() if p.requires_grad]
        groups += [dict(params=[p for p in trained if p not in muon and p.dim() >= 2], weight_decay=settings.weight_decay, share=share),
                   dict(params=[p for p in trained if p not in muon and p.dim() < 2], weight_decay=0.0, share=share)]
        matrices.append(dict(params=[p for p in trained if p in muon], share=share))
    adamw = torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), fused=next(model.parameters()).is_cuda)
    return [adamw, Muon(matrices, settings.learning_rate, settings.momentum, settings.weight_decay)] if muon else [adamw]


def learning_rate(step, settings):
    """Linear warm-up, then a cosine from the peak to min_lr_ratio of it."""
    warmup = max(1, round(settings.warmup_ratio * settings.max_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    t = (step - warmup) / max(1, settings.max_steps - warmup)
    return settings.learning_rate * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * (1 + math.cos(math.pi * t)) / 2)


def saved_run(settings):
    """The checkpoint to go on from, or None. Raises: ValueError when out_dir holds a run with other settings."""
    if settings.fresh or not (Path(settings.out_dir) / 'ckpt.pt').is_file():
        return None
    saved = evaluation.read_checkpoint(settings.out_dir, unfinished=True)
    ours, theirs = asdict(settings), asdict(TrainConfig()) | saved['settings']  # what the run did not know yet had its default's effect
    idle = FREE + ALIGN * (settings.stage == 'answer')
    other = [f'{key}={theirs.get(key)} there, {value} here' for key, value in ours.items() if key not in idle and theirs.get(key) != value]
    if other:
        raise ValueError(f'{settings.out_dir} holds a run with other settings ({"; ".join(other)}): choose another --out_dir, '
                         f'or start over with --fresh=true')
    return saved


def unchanged(settings, saved, key, fingerprint):
    """Raises: ValueError where a run that goes on finds another dataset, encoder or trunk under the name that it began with."""
    if saved and saved[f'{key}_fingerprint'] != fingerprint:
        raise ValueError(f'{key}={getattr(settings, key)}: not the one that the run in {settings.out_dir} began with; start over with --fresh=true')


def facts(settings, task, run, about):
    """What metrics.json says beside the results."""
    return dict(parameters=task.parameter_counts(), step=run.step, best_step=run.best and run.best['step'], bad_steps=run.bad_steps, train_s=run.train_s,
                wall_s=run.wall_s, peak_memory_gb=most_memory(task.device) / 1e9, **about, settings=asdict(settings))


if __name__ == '__main__':
    run_script(main)
