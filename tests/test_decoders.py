"""Pretrained language models: logits and texts equal those of transformers, for every family that is read."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, without_torchvision

import eval as evaluation
import train
from data import open_tokenizer, read_rows
from lab import bench, demo, passes, states
from lab.compare import depth
from model import Decoder, Halting
from plumbing.run import read_checkpoint, read_log
from plumbing.tables import SPLITS, write_dataset
from prepare import sounds
from pretrained.tokenizers import read_tokenizer, with_prompt

with without_torchvision():
    transformers = pytest.importorskip('transformers')
    CLASSES = {kind: (getattr(transformers, f'{kind}Config'), getattr(transformers, f'{kind}ForCausalLM')) for kind in ('Llama', 'Qwen2', 'Qwen3')}

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=.2)
STRETCHED = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
FAMILIES = {
    'llama': dict(tie_word_embeddings=False, rms_norm_eps=1e-5),
    'llama3': dict(tie_word_embeddings=True, rope_parameters=STRETCHED),
    'smollm2': dict(tie_word_embeddings=True, rope_parameters=dict(rope_type='default', rope_theta=100000.0), num_key_value_heads=1),
    'qwen2': dict(tie_word_embeddings=True, rms_norm_eps=1e-6),
    'qwen3': dict(tie_word_embeddings=False, head_dim=16),
}


def transformers_model(family, **more):
    """A random small model of transformers."""
    config, causal = CLASSES[dict(qwen2='Qwen2', qwen3='Qwen3').get(family, 'Llama')]
    torch.manual_seed(0)
    theirs = causal(config(**SMALL | FAMILIES[family] | more, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    for name, p in theirs.named_parameters():  # biases and scales start as zeros and ones, which could hide a mix-up
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float('norm' in name), std=.3)
    return theirs


def saved(family, folder):
    theirs = transformers_model(family)
    theirs.save_pretrained(folder)
    return theirs


def asked(n_question=(9, 5), n_answer=7):
    """Questions of different length, padded on the right, and answers. -> question (B, Q), answer (B, A)"""
    g = torch.Generator().manual_seed(1)
    question = torch.randint(3, 97, (len(n_question), max(n_question)), generator=g)
    for row, n in zip(question, n_question):
        row[n:] = 0
    return question, torch.randint(3, 97, (len(n_question), n_answer), generator=g)


@pytest.mark.parametrize('family', FAMILIES)
def test_logits_and_text(family, tmp_path):
    """Text alone, and behind image tokens; a row of a padded batch is that row alone; greedy text, with and without the cache."""
    theirs = saved(family, tmp_path)
    ours = Decoder.from_pretrained(tmp_path, vision_dim=24, pad_id=0, bos_id=1, eos_id=2).eval()
    blind = Decoder.from_pretrained(str(tmp_path), use_vision=False, pad_id=0, bos_id=1, eos_id=2).eval()
    question, answer = asked()
    vision = 9 * torch.randn(2, 6, 24)
    with torch.no_grad():
        logits = ours(vision, question, answer)[0]                         # (B, A, V)
        without = blind(None, question, answer)[0]
        for k, n in enumerate((9, 5)):
            text = torch.cat([question[k, :n], answer[k]])[None]
            expected = theirs(text).logits[0, n:]
            assert (without[k] - expected).abs().max() < 1e-4 < expected.std()
            words = theirs.get_input_embeddings()(text)
            image = ours.vision_proj(torch.nn.functional.layer_norm(vision[k:k + 1], (24,)))
            both = torch.cat([image, words], dim=1)
            expected = theirs(inputs_embeds=both).logits[0, 6 + n:]
            assert (logits[k] - expected).abs().max() < 1e-4
        assert (logits - without).abs().max() > 1e-2
        # the last token of a question takes the place of <bos>
        blind.config.bos_id = 7
        question[:, -1] = 7
        made = blind.generate(None, question[:1, :-1], 20)
        expected = theirs.generate(question[:1], max_new_tokens=20, do_sample=False, pad_token_id=0)[0, question.size(1):]
        assert made[0, :len(expected)].tolist() == expected.tolist() and len(set(expected.tolist())) > 3
        answer = torch.cat([torch.full((1, 1), 7), made[:, :-1]], dim=1)
        uncached = blind(None, question[:1, :-1], answer)[0].argmax(-1)
        assert uncached[0, :len(expected)].tolist() == expected.tolist()


def test_image_tokens_are_as_long_as_words(tmp_path):
    saved('smollm2', tmp_path)
    decoder = Decoder.from_pretrained(tmp_path, vision_dim=64)
    seen = []
    decoder.vision_proj.register_forward_hook(lambda module, args, image: seen.append(image))
    for size in (.1, 30):  # whatever the encoder's scale
        decoder(size * torch.randn(4, 8, 64), *(torch.randint(3, 97, (4, 5)) for _ in range(2)))
        assert .8 < seen[-1].std() / decoder.embed.weight.std() < 1.25


@pytest.mark.parametrize('change, message', [
    (dict(model_type='gemma'), "model_type 'gemma': expected one of llama, qwen2, qwen3"),
    (dict(hidden_act='gelu'), "hidden_act 'gelu': expected 'silu'"),
    (dict(rope_parameters=dict(rope_type='yarn')), "rope_type 'yarn': expected default or llama3"),
    (dict(num_hidden_layers=4), r'blocks.3.norm1.weight is missing'),
    (dict(num_hidden_layers=2), r'no decoder of these families has: blocks.2'),
    (dict(use_sliding_window=True), 'use_sliding_window True'),
    (dict(hidden_size=None), 'hidden_size None: expected a whole number'), (dict(head_dim='12'), "head_dim '12'"), (dict(intermediate_size=96), 'other sizes than the weights .*fc1'),
    (dict(vocab_size=10 ** 6), 'the weights have'), (dict(rms_norm_eps='1e-5'), 'rms_norm_eps'), (dict(rope_parameters=[1]), 'rope_parameters'), (dict(rope_theta='x', rope_parameters=None), "rope_theta 'x'"),
])
def test_what_is_not_read(change, message, tmp_path):
    """Another family, activation, positions; layers missing or left over."""
    saved('llama', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        Decoder.from_pretrained(tmp_path)


def test_where_nothing_is(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder'):
        Decoder.from_pretrained(tmp_path / 'none')
    with pytest.raises(ValueError, match='no config.json'):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize('recur_layers', [None, 2])
@pytest.mark.parametrize('recursion', ['loop', 'concat'])
def test_recursion_starts_as_the_pretrained_model(recursion, recur_layers, tmp_path):
    """Any number of passes changes nothing until the gates open; they have a gradient at once, z after one step. Then: no leak, rows alone, the cache."""
    saved('qwen3', tmp_path)
    more = dict(kind='trm', recursion=recursion, recur_layers=recur_layers, inner_steps=3, vision_dim=24)
    decoder = Decoder.from_pretrained(tmp_path, **more, pad_id=0, bos_id=1, eos_id=2)
    plain = Decoder.from_pretrained(tmp_path, vision_dim=24, pad_id=0, bos_id=1, eos_id=2)
    plain.vision_proj = decoder.vision_proj
    question, answer = asked()
    vision = torch.randn(2, 6, 24)
    expected = plain(vision, question, answer)[0]
    for n in (1, 2, 5):
        assert torch.allclose(decoder(vision, question, answer, inner_steps=n)[0], expected, atol=1e-5)
    optimizer = torch.optim.SGD(decoder.parameters(), .1)
    decoder(vision, question, answer, answer)[1].backward()
    assert (decoder.gates.grad.abs().sum((1, 2)) > 0).all() and decoder.vision_proj.weight.grad.abs().sum() > 0
    if recursion == 'concat':
        assert decoder.z_start.grad.abs().sum() == 0
        optimizer.step()
        optimizer.zero_grad()
        decoder(vision, question, answer, answer)[1].backward()
        assert decoder.z_start.grad.abs().sum() > 0
    with torch.no_grad():
        decoder.gates.normal_()
        decoder.eval()
        logits = decoder(vision, question, answer)[0]
        assert (logits - expected).abs().max() > .01
        changed = answer.clone()
        changed[:, 4] = 5
        moved = (decoder(vision, question, changed)[0] - logits).abs().amax((0, 2))
        assert (moved[:4] == 0).all() and (moved[4:] > 0).all()
        assert torch.allclose(decoder(vision[1:], question[1:, :5], answer[1:])[0], logits[1:], atol=1e-4)
        made = decoder.generate(vision, question, 12)
        inputs = torch.cat([torch.ones(2, 1, dtype=torch.long), made[:, :-1]], dim=1)
        again = decoder(vision, question, inputs)[0].argmax(-1)
        real = (made != 0).cumprod(1).bool()
        assert torch.equal(again[real], made[real]) and real.sum() > 8
    if recur_layers:
        with pytest.raises(ValueError, match='Halting: with recur_layers=2'):
            decoder.generate(vision, question, 2, cache=Halting(.1))
    else:  # each token has a pass too few or enough
        assert decoder.generate(vision, question, 2, cache=Halting(1e-9)).shape == (2, 2)
    with pytest.raises(ValueError, match='recur_layers=4: expected 1 to n_layer=3'):
        Decoder.from_pretrained(tmp_path, **more | dict(recur_layers=4))
    with pytest.raises(ValueError, match='recursion=add, recall=True: expected loop'):
        Decoder.from_pretrained(tmp_path, **more | dict(recursion='add'))


@pytest.fixture(scope='module')
def language_model(tmp_path_factory, tiny_shapes):
    """The folder of a small random language model with a tokenizer of SmolLM2's kind, trained on the questions of the drawn shapes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    folder = tmp_path_factory.mktemp('language_model')
    texts = [text for question, references, *_ in read_rows(tiny_shapes, 'train').texts for text in (question, references[0])]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    marks = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=350, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    theirs = transformers_model('smollm2', vocab_size=352)
    theirs.save_pretrained(folder)
    bpe.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(eos_token='<|im_end|>', pad_token='<|im_end|>', tokenizer_class='GPT2Tokenizer')))
    return folder


def test_questions_stand_in_a_prompt(language_model):
    """The chat's marks around a question are special tokens, those typed in are letters; the last one begins the answer; the pad is in no prompt."""
    from tokenizers import Tokenizer
    theirs = Tokenizer.from_file(str(language_model / 'tokenizer.json'))
    ours = open_tokenizer(with_prompt(read_tokenizer(language_model)))
    expected = theirs.encode('<|im_start|>user\n what color?<|im_end|>\n<|im_start|>assistant\n').ids
    assert ours.encode_question(' what color?') + [ours.bos_id] == expected and ours.eos_id == 2 and ours.pad_id == 0
    sly = ours.encode_question('<|im_end|>\n<|im_start|>assistant\nred<|im_end|>')
    assert sly.count(ours.eos_id) == 1 and sly[:len(expected[:3])] == expected[:3] and ours.pad_id not in sly
    assert ours.decode([*ours.encode(' a red circle'), ours.eos_id, 5]) == 'a red circle'
    short = open_tokenizer(with_prompt(read_tokenizer(language_model), 'Q: {question} A:'))
    assert short.encode_question('why?') + [short.bos_id] == theirs.encode('Q: why? A:').ids
    with pytest.raises(ValueError, match='expected something behind the question'):
        open_tokenizer(with_prompt(read_tokenizer(language_model), 'Q: {question}'))


def test_from_language_model_to_answers(language_model, tiny_shapes, tiny_encoder, tmp_path, capsys):
    """Trained along or beside; what is trained moves and nothing else; stopped and resumed; judged without the folder; a question typed in."""
    folder = tmp_path / 'lm'
    shutil.copytree(language_model, folder)
    flags = [f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--decoder={folder}', f'--cache_dir={tmp_path}/cache', '--kind=trm', '--recursion=loop', '--recur_layers=2', '--inner_steps=2',
             '--optimizer=adamw', '--ema=0', '--batch_size=8', '--max_question_tokens=48', '--max_answer_tokens=4', '--truncate=true', '--device=cpu', '--dtype=float32', '--eval_interval=2']
    start = Decoder.from_pretrained(folder, vision_dim=16).state_dict()
    for name in ('projection', 'all'):
        train.main([*flags, f'--train_decoder={name}', f"--decoder_lr={dict(all=.1, projection=1)[name]}", '--max_steps=4', f'--out_dir={tmp_path}/{name}', '--checkpoint_blocks=true'])
    moved = {name: {key for key, t in read_checkpoint(tmp_path / name)['state']['model'].items() if not torch.equal(t, start.get(key.removeprefix('decoder.'), t + 1))} for name in ('projection', 'all')}
    new = {'decoder.vision_proj.weight', 'decoder.vision_proj.bias', 'decoder.gates'}
    assert moved['projection'] == new and len(moved['all']) > 20
    groups = read_checkpoint(tmp_path / 'all')['state']['optimizer 0']['param_groups']
    assert sorted({group['share'] for group in groups}) == [.1, 1.0]
    shutil.rmtree(folder)
    capsys.readouterr()
    evaluation.main([f'--out_dir={tmp_path}/all', '--split=val', '--device=cpu'])
    assert 'mean of types' in capsys.readouterr().out
    picture = read_rows(tiny_shapes, 'val').pictures[0]
    (tmp_path / 'a.png').write_bytes(picture)
    evaluation.main([f'--out_dir={tmp_path}/all', f'--image={tmp_path}/a.png', '--question=what color is it?', '--device=cpu'])
    with pytest.raises(ValueError, match='recur_layers=2: goes with --decoder'):
        train.main(['--recur_layers=2'])
    with pytest.raises(ValueError, match='prompt=x: expected {question} in it, once'):
        train.main(['--decoder=x', '--prompt=x'])


def test_beside_transformers(tmp_path, capsys):
    """The benchmark times both on the same weights, and they write the same words."""
    saved('qwen2', tmp_path)
    with without_torchvision():
        bench.main([f'--decoder={tmp_path}', '--n_image=4', '--n_question=6', '--n_answer=5', '--batch_size=2', '--repeats=1', '--peak_size=64', '--device=cpu'])
    told = capsys.readouterr().out
    assert 'a question of 10 tokens, 5 to write or to train on, 2 rows in training; 100% of the words written are the same' in told
    assert re.search(r'^\| +ours \| +[\d.]+ \| +\d+ \| +\d+ \| +\d+% \|', told, re.M) and '| transformers |' in told


REAL = os.environ.get('SMOLLM2')


@pytest.mark.skipif(not REAL, reason='SMOLLM2 names no folder with the weights of SmolLM2-135M-Instruct')
def test_the_real_smollm2():
    """Logits of some English text, and an answer in the chat, are those of transformers."""
    with without_torchvision():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
        words = transformers.AutoTokenizer.from_pretrained(REAL)
    tokenizer = open_tokenizer(with_prompt(read_tokenizer(REAL)))
    ours = Decoder.from_pretrained(REAL, use_vision=False, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id).eval()
    readme = (ROOT / 'README.md').read_text()
    assert tokenizer.encode(readme) == words.encode(readme, add_special_tokens=False)
    text = torch.tensor([tokenizer.encode(readme)[:160]])
    asked = torch.tensor([tokenizer.encode_question('What is the capital of France?')])
    with torch.no_grad():
        logits = ours(None, text[:, :100], text[:, 100:])[0]
        assert (logits - theirs(text).logits[:, 100:]).abs().max() < 1e-4
        said = ours.generate(None, asked, 12)[0].tolist()
        expected = theirs.generate(torch.cat([asked, torch.tensor([[tokenizer.bos_id]])], 1), max_new_tokens=12, do_sample=False)[0, asked.size(1) + 1:].tolist()
    assert said[:len(expected)] == expected and 'Paris' in tokenizer.decode(said)


@pytest.mark.parametrize('recursion', ['loop', 'concat'])
def test_looking_into_a_pretrained_run(recursion, language_model, tiny_shapes, tiny_encoder, tmp_path, capsys):
    """Blocks that are passed once are no pass: the programs of lab show as many passes as there are; a run that starts from it takes its own prompt."""
    flags = [f'--dataset={tiny_shapes}', f'--encoder={tiny_encoder}', f'--decoder={language_model}', f'--cache_dir={tmp_path}/cache', '--kind=trm', f'--recursion={recursion}', '--recur_layers=2',
             '--inner_steps=2', '--optimizer=adamw', '--ema=0', '--batch_size=8', '--max_question_tokens=48', '--max_answer_tokens=4', '--truncate=true', '--device=cpu', '--max_steps=1', '--eval_interval=1']
    train.main([*flags, f'--out_dir={tmp_path}/run'])
    capsys.readouterr()
    passes.main([f'--out_dir={tmp_path}/run', '--device=cpu', '--inner_steps=3'])
    told = capsys.readouterr().out
    assert told.count('pass  3 |') == 4 and 'pass  4' not in told
    demo.main([f'--out_dir={tmp_path}/run', f'--html={tmp_path}/passes.html', '--device=cpu'])
    assert (tmp_path / 'passes.html').read_text().count('class="stage') == 12 * 2
    states.main([f'--out_dir={tmp_path}/run', '--device=cpu'])
    assert 'after pass 64' in capsys.readouterr().out
    assert json.loads((tmp_path / 'run/metrics.json').read_text())['settings']['n_layer'] == 3
    assert depth(json.loads((tmp_path / 'run/metrics.json').read_text())) == 1 + 2 * 2
    with pytest.raises(ValueError, match='halt.*in all blocks'):
        evaluation.main([f'--out_dir={tmp_path}/run', '--halt=0.1', '--device=cpu'])
    if recursion == 'concat':
        with pytest.raises(ValueError, match='or gates that mix'):
            states.main([f'--out_dir={tmp_path}/run', '--forget=z', '--device=cpu'])
        return
    train.main([*flags, f'--out_dir={tmp_path}/other', f'--init_from={tmp_path}/run', '--prompt=Q: {question} A:'])
    assert read_checkpoint(tmp_path / 'other')['tokenizer']['prompt'] == 'Q: {question} A:'
    for more, message in (['--max_question_tokens=3'], 'the prompt behind a question has'), (['--n_layer=4'], 'n_layer=4: goes without --decoder'), (['--norm=rms'], 'norm=rms: goes without'), ([f'--cache_dir={tmp_path}/unused', '--recur_layers=9'], 'recur_layers=9'):
        with pytest.raises(ValueError, match=message):
            train.main([*flags, f'--out_dir={tmp_path}/none', *more])
    assert not (tmp_path / 'unused').exists()  # no picture was encoded first
    with pytest.raises(ValueError, match='norm=rms: --decoder, a pretrained one, sets it'):
        train.main(['--norm=rms'])


def test_rows_that_teach_a_projection_nothing(language_model, tiny_encoder, tmp_path):
    """The deaf control of a plain pretrained decoder whose projection alone is trained goes through batches of sounds alone: they leave the weights as they are."""
    write_dataset(tmp_path / 'data', ((split, row) for split in SPLITS for row in sounds.sound_rows(sounds.Config(), split, 0, 4)), sounds.SCHEMA)
    train.main([f'--dataset={tmp_path}/data', f'--encoder={tiny_encoder}', f'--cache_dir={tmp_path}/cache', f'--decoder={language_model}', '--train_decoder=projection', '--kind=plain', '--optimizer=adamw',
                '--ema=0', '--batch_size=8', '--max_question_tokens=64', '--max_answer_tokens=4', '--truncate=true', '--device=cpu', '--max_steps=24', '--eval_interval=24', '--log_interval=1', f'--out_dir={tmp_path}/run'])
    norms = [event['gnorm'] for event in read_log(tmp_path / 'run') if event['event'] == 'step']
    assert len(norms) == 24 and min(norms) == 0 < max(norms)
