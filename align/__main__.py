"""Stage 1: the encoder learns from captions.

    python -m align config/align.py"""
import json
import math
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from align.captions import Captions, DrawnCaptions, caption_sample
from align.judge import probe, retrieval
from align.model import AlignModel
from data import Tokenizer, read_rows, train_bpe
from encoder import Encoder, EncoderConfig, load_encoder, open_encoder, save_encoder
from eval import rows_to_judge
from plumbing.console import table
from plumbing.features import vision_source
from plumbing.files import write_whole
from plumbing.machine import on_device
from plumbing.plots import draw_curves
from plumbing.ranks import in_turn, rank_and_world
from plumbing.tables import check_splits
from prepare.shapes import Config as ShapesConfig
from train import unchanged


class AlignTask:
    """Stage 1: the encoder learns from captions, of pictures that are drawn as they are needed or of a dataset. A pretrained trunk is
    frozen: what it makes of the pictures is computed once, and what follows it is trained."""
    metric = 'R@1'

    def __init__(self, settings, device, saved, splits=('train', 'val')):
        self.settings, self.device, self.frozen, self.fingerprint, self.vision, self.rows_sum = settings, device, None, None, {}, None
        world = rank_and_world()[1]
        if settings.batch_size % world:
            raise ValueError(f'batch_size={settings.batch_size}: {world} processes contrast as many captions each: expected a multiple of {world}')
        if settings.captions == 'drawn':
            shapes = ShapesConfig(image_px=settings.image_px, max_objects=settings.max_objects, seed=settings.seed)
            texts = caption_sample(shapes)
        else:
            if splits:  # it trains; who only evaluates needs no more than what is evaluated
                check_splits(settings.dataset)
            rows = {split: read_rows(settings.dataset, split) for split in splits}
            texts = (caption for caption in rows['train'].captions) if not saved else ()
            if splits:
                self.rows_sum = {split: r.sum.hexdigest() for split, r in rows.items()}
                unchanged(settings, saved, 'dataset', self.rows_sum)
        self.tokenizer = Tokenizer(saved['tokenizer'] if saved else train_bpe(texts, settings.vocab_size))
        s, D = settings, settings.encoder_dim
        trunk = dict(image_px=s.image_px, width=s.encoder_width, n_layer=s.encoder_layers)
        trunk |= {key: getattr(s, key) for key in ('fit', 'upright', 'activation') if getattr(s, key) is not None}
        if s.trunk:
            self.frozen = open_encoder(s.trunk, asdict(s), pool=s.pool).to(device)
            if self.frozen.config.n_latents or self.frozen.config.projection != 'none':
                raise ValueError(f'trunk={s.trunk}: an encoder with a resampler or a projection; expected CLIP alone')
            trunk = asdict(self.frozen.config)
            self.fingerprint = self.frozen.fingerprint()
            unchanged(settings, saved, 'trunk', self.fingerprint)
        if s.prefixes and not re.fullmatch(r'\d+(,\d+)*', s.prefixes):
            raise ValueError(f'prefixes={s.prefixes}: expected numbers, separated by commas')
        prefixes = [int(d) for d in s.prefixes.split(',')] if s.prefixes else [D // 8, D // 4, D // 2, D]
        self.config = EncoderConfig(**trunk | dict(
            pool=s.pool, adapter=s.adapter, n_latents=s.n_latents, perceiver_layers=s.perceiver_layers, perceiver_width=s.perceiver_width,
            perceiver_heads=s.perceiver_heads, projection='linear', vision_dim=D, prefixes=tuple(sorted(prefixes))))
        self.model = AlignModel(Encoder(self.config), self.tokenizer.vocab_size, s.text_width, s.text_layers)
        if s.trunk:
            self.model.encoder.trunk = torch.nn.Identity()
        if s.captions == 'drawn':
            drawn = DrawnCaptions(shapes, self.tokenizer)
            self.data = {split: partial(drawn.batch, split) for split in ('train', 'val', 'test')}
            self.drawn, self.pictures = drawn, dict.fromkeys(self.data, 1000)
        else:
            self.data, self.drawn, self.pictures = {}, None, {}
            for split in splits:
                self.open(split, rows[split])

    def open(self, split, rows):
        """Makes a split of the dataset ready: its captions as tokens, its pictures encoded by the frozen trunk."""
        captions = Captions(rows, self.tokenizer)
        seen = asdict(self.settings) | dict(use_vision=True, vision_dim=None, train_encoder=self.frozen is None)
        self.vision[split] = vision_source(seen, self.frozen or self.model.encoder, rows, self.device)
        self.data[split], self.pictures[split] = captions.batch, len(rows.pictures)

    def chance(self):
        return self.chosen({'contrast': math.log(self.settings.batch_size), 'cloze': math.log(self.tokenizer.vocab_size)})

    def chosen(self, losses):
        return {name: loss for name, loss in losses.items() if self.settings.objective in (name, 'both')}

    def batch(self, step):
        batch = self.data['train'](step, self.settings.batch_size, self.settings.seed)
        return batch | dict(counted=batch['left_out'])

    def tokens(self, model, batch, split):
        """The encoder's tokens of a batch. -> (B, N, D)"""
        if self.drawn:
            return model.encoder(model.encoder.normalise(batch['pixels']))
        seen = self.vision[split](self.frozen or model.encoder, batch['picture'])
        return model.encoder.resample(seen) if self.frozen else seen

    def losses(self, model, batch, split='train'):
        losses = model(self.tokens(model, batch, split), batch['caption'], batch['left_out'])
        return self.chosen(losses | {'cloze': losses['cloze'] * batch.get('weight', 1)})

    @torch.no_grad()
    def validate(self, model, split='val', most=1000):
        """Loss, and retrieval among up to `most` pictures."""
        loss, pooled, text, size = 0, [], [], min(250, most, self.pictures[split])
        steps = min(most, self.pictures[split]) // size
        for step in range(steps):
            batch = on_device(self.data[split](step, size, self.settings.seed), self.device)
            loss += sum(self.losses(model, batch, split).values()).item() / steps
            pooled.append(self.tokens(model, batch, split).mean(1).float())
            text.append(model.read_text(batch['caption'])[1].float())
        self.retrieval, self.ranked = retrieval(torch.cat(pooled), torch.cat(text), self.config.prefixes), steps * size
        return {'loss': loss, 'R@1': self.retrieval[self.config.vision_dim]['R@1']}

    def better(self, new, old):
        return new['loss'] <= old['loss']

    def weights(self, model):
        return {'model': model.state_dict()}

    def state(self):
        return dict(encoder_config=asdict(self.config), tokenizer=self.tokenizer.state, dataset_fingerprint=self.rows_sum, trunk_fingerprint=self.fingerprint)

    def parameter_counts(self):
        encoder, total = (sum(p.numel() for p in m.parameters()) for m in (self.model.encoder, self.model))
        return dict(encoder=encoder, text=total - encoder, total=total) | (
            {'frozen trunk': sum(p.numel() for p in self.frozen.parameters())} if self.frozen else {})

    def report(self, model, split, most=5000):
        """Prints retrieval at every prefix and, of drawn pictures, what a probe reads from the tokens -> both, and the loss."""
        if split not in self.data:
            self.open(split, rows_to_judge(self.settings.dataset, split))
        scores = self.validate(model, split, most)
        print(f'retrieval among {self.ranked} pictures, both ways')
        print(table(['dimensions', 'R@1', 'R@5', 'R@10', 'median rank'], [
            [d, *(f'{r[k]:.3f}' for k in ('R@1', 'R@5', 'R@10')), f"{r['median rank']:.0f}"] for d, r in self.retrieval.items()]))
        scores |= dict(retrieval=self.retrieval)
        if self.drawn:
            scores['probe'] = probe(model.encoder, self.drawn, self.device)
            print('probe | ' + ' | '.join(f'{k} {v:.3f}' for k, v in scores['probe'].items()))
        return scores

    def finish(self, model, facts):
        """Writes encoder.pt, the trunk included, and reports on the test split, which nothing has looked at so far."""
        out_dir = Path(self.settings.out_dir)
        if self.frozen:
            model.encoder.trunk = self.frozen.trunk
        in_turn(lambda: save_encoder(model.encoder, out_dir / 'encoder.pt'))
        model.encoder = load_encoder(out_dir / 'encoder.pt').to(self.device)  # what was written is what is judged
        metrics = facts | self.report(model, 'test')
        write_whole(out_dir / 'metrics.json', lambda f: f.write(json.dumps(metrics, indent=1).encode()))
        draw_curves(out_dir)
