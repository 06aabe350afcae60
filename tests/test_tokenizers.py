"""Tokenizers that others trained: every text gets the ids that the package tokenizers gives it, and none of them is a special token's."""

import hashlib
import json
import random
import unicodedata

import pytest
from conftest import ROOT

from pretrained.tokenizers import BYTES, decode, encode, encoding_of, normalized, read_tokenizer

tokenizers = pytest.importorskip('tokenizers')

BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
SPLIT = {'type': 'Split', 'behavior': 'Isolated', 'invert': False}
# written out as the families' files have them, not taken from the module
LLAMA_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sequence(*steps):
    return {'type': 'Sequence', 'pretokenizers': list(steps)}


CUTS = {
    'gpt2': BYTE_LEVEL,
    'smollm': sequence({'type': 'Digits', 'individual_digits': True}, BYTE_LEVEL),
    'qwen': sequence(SPLIT | {'pattern': {'Regex': QWEN_REGEX}}, BYTE_LEVEL | {'use_regex': False}),
    'llama': sequence(SPLIT | {'pattern': {'Regex': LLAMA_REGEX}}, BYTE_LEVEL | {'use_regex': False}),
}
SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
ODD = [
    '', ' ', '  ', '\n', '\r\n', '\t', "I'm he'LL WE'VE it's IT'S they'Re 'tis o'D 'd's", "it'\u017f IT'\u017fx '\u212a 'k", "'s't're've'm'll'd",
    'a  b   c    d', ' lead', 'trail ', 'tabs\t\tand\n\n\nlines \n \n  x', 'one\r\n\r\n two\rthree\r', 'def f(x):\n\tif x  >= 10:\n        return {"a": [1, 2]}  # no\n',
    '1 12 123 1234 12345 3.14 1,000', '  12', '   3a', 'a1b22c333', '\u0661\u0662\u0663\u0664 \u0967\u0968\u0969 \uff11\uff12 \u2167 \u00bd \u00b2 \u3007\u4e00 \U0001d7d8\U0001d7d9',
    '\u00a0x\u2003y\u3000z\u200bw\u2028v\u2029u\u0085t\u1680s\u180er\ufeff', '\x00\x01\x1c\x1d\x1e\x1f\x7f\x80\x9f', 'e\u0301 \u00e9 A\u030a\u0323 \u212b \u1e9b\u0323 q\u0307\u0323', '\u1112\u1161\u11ab\uae00 \ud55c',
    '\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f4\U000e0067\U000e0062\U000e007f \U0001f1eb\U0001f1f7 \u2764\ufe0f 1\ufe0f\u20e3 \U0001f44b\U0001f3fd',
    '\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f\uff01', '\u0627\u0644\u0633\u0651\u0644\u0627\u0645\u064f \u0639\u0644\u064a\u0643\u0645', '\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd', '\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u093c',
    '\U0001d11e\U00010348\U0002070e\U000e0001\U000f0000\U0010fffd\uffff\ufffd', 'Vi\u1ec7t Nam Vie\u0323\u0302t', '_snake_case__ --- ... ?!?! $$$', '<|im_end|> <|endoftext|>x<tool_call></tool_call> <|im_start|>user\n',
    ' ' * 700, '\n' * 600, 'a' * 1500, 'ab' * 700, '-' * 600, ' \t' * 400 + 'x', '9' * 700, '\u0301' * 300, 'the' * 400,
]
# digits of Unicode 17, which tokenizers knows in one of the two places where it asks for digits
NEW_DIGITS = {*range(0x11de0, 0x11dea), *range(0x16ff4, 0x16ff7)}


def random_texts(seed, n):
    """Of a few kinds of characters each, in pieces that run and alternate."""
    draw = random.Random(seed)
    kinds = [
        'abcdeist', 'ABETS', ' ', ' \t\n\r', '0123456789', "'", ".,;:!?-_()[]{}<>|/\\\"#$%&*+=@^`~", '\u00a0\u2003\u3000\u0085\u2028', '\u017f\u212a\u0130\u0131\u00df\ufb05',
        '\u0300\u0301\u0302\u0323\u0327\u0345', '\u00e9\u00fc\u00e5\u1ec7\u212b', '\u4e2d\u6587\u5b57\u3042\u30a2', '\u0627\u0628\u064e\u0651\u0661', '\u0915\u093c\u094d\u0967\u09c7\u09be',
        '\u1100\u1161\u11a8\uac00', '\U0001f600\u200d\ufe0f\U0001f3fd\U0001f1e9', '\x00\x07\x1b\x1f\x7f', '\u00b2\u00bd\u2167\u3007\U0001d7d8',
    ]
    words = ["'s", "'S", "'LL", "'re", ' the', 'ing', '  ', '\r\n', '<|im_end|>', '<tool_call>', ' 42', 'zqxjkv']
    for _ in range(n):
        some = draw.sample(kinds, 3)
        parts = []
        for _ in range(draw.randint(1, 14)):
            what = draw.random()
            if what < .2:
                parts.append(draw.choice(words))
            elif what < .3:
                c = draw.randrange(draw.choice([0x800, 0x10000, 0x20000, 0x110000]))
                parts.append('' if unicodedata.category(chr(c)) in ('Cn', 'Cs') else chr(c))
            else:
                parts.append(''.join(draw.choices(draw.choice(some), k=draw.randint(1, 4))))
        yield ''.join(parts)


def paragraphs():
    return (ROOT / 'README.md').read_text(encoding='utf-8').split('\n\n')


def trained(family, every_byte=True):
    """What a small tokenizer.json of a family says, made by the package itself."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    as_written = json.loads(t.to_str()) | {'pre_tokenizer': CUTS[family], 'normalizer': {'type': 'NFC'} if family == 'qwen' else None}
    t = tokenizers.Tokenizer.from_str(json.dumps(as_written))
    first = SPECIALS if family == 'smollm' else []
    alphabet = list(BYTES) if every_byte else []
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    # a few odd texts too, without whole alphabets: tokens of several bytes that are no text by themselves
    t.train_from_iterator([*paragraphs(), *ODD[6:33] * 3], trainer)
    t.add_special_tokens(SPECIALS)
    t.add_tokens(['<tool_call>', '</tool_call>'])
    return json.loads(t.to_str())


def with_tokens(written, tokens, merges):
    """More tokens behind those of the vocabulary, and more merges; the added tokens come after them."""
    model = written['model']
    vocab = model['vocab'] | {token: len(model['vocab']) + k for k, token in enumerate(tokens)}
    added = [token | {'id': vocab.get(token['content'], token['id'] + len(tokens))} for token in written['added_tokens']]
    return written | {'model': model | {'vocab': vocab, 'merges': model['merges'] + merges}, 'added_tokens': added}


def across_borders(written):
    """Merges of any byte with a letter, a digit, a space and a mark: a border of words in the wrong place changes the ids."""
    pairs = [[x, y] for x in 'a1\u0120' for y in BYTES] + [[x, y] for x in BYTES for y in '1\u0120!']
    fresh = {x + y: [x, y] for x, y in pairs if x + y not in written['model']['vocab']}
    return with_tokens(written, list(fresh), list(fresh.values()))


def as_llama(written):
    """All pairs that make a token, by token, and words that no merge makes: as Llama 3's file is converted from tiktoken's."""
    vocab = written['model']['vocab']
    merges = []
    for token in vocab:
        pairs = [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    written = with_tokens(written, ['zqxjkv', '\u0120zqxjkv', '\u0120Vi\u00e1\u00bb\u0129t'], [])
    return written | {'model': written['model'] | {'merges': [list(pair) for pair in merges], 'ignore_merges': True}}


def save(folder, written, **config):
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(json.dumps(written), encoding='utf-8')
    if config:
        (folder / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    return folder


def reference(written):
    """The package's tokenizer, without the added tokens: it matches them in a text before anything else."""
    return tokenizers.Tokenizer.from_str(json.dumps(written | {'added_tokens': [], 'post_processor': None}))


def same(state, theirs, texts):
    """Asserts equal ids, and that the ids are the text again unless bytes are lacking."""
    encoding = encoding_of(state)
    used = set()
    for text in texts:
        ids = encode(state, encoding, text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, (text[:80], ascii(text[:80]))
        assert state['lacking'] or decode(state, ids) == normalized(state, text)
        used.update(ids)
    return used


@pytest.fixture(scope='module')
def families():
    made = {family: across_borders(trained(family)) for family in CUTS}
    made['llama'] = as_llama(made['llama'])
    return made


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    written = trained('gpt2')
    assert read_tokenizer(save(tmp_path_factory.mktemp('small'), written))
    return written


@pytest.mark.parametrize('family', CUTS)
def test_ids_are_those_of_tokenizers(family, families, tmp_path):
    """Odd texts and some thousand random ones, and nearly all tokens were in use."""
    state = read_tokenizer(save(tmp_path, families[family]))
    assert state['in_order'] and state['nfc'] == (family == 'qwen')
    used = same(state, reference(families[family]), [*ODD, *(a + b for a in ODD[:36] for b in ODD[:36]), *paragraphs(), *random_texts(family, 1200)])
    assert len(used) > 550
    assert state == json.loads(json.dumps(state))  # plain types alone
    # what tiktoken itself gives; and special tokens where it is told to look for them
    assert encoding_of(state).encode_ordinary(' the picture') == encode(state, encoding_of(state), ' the picture')
    assert encoding_of(state).encode('<|im_end|>', allowed_special='all') == [state['specials']['<|im_end|>']]


@pytest.mark.parametrize('family', ['gpt2', 'smollm', 'qwen'])  # Llama 3 has Qwen's words but for runs of digits
def test_every_character(family, families, tmp_path):
    """Those of the first plane but the middles of its large blocks, and a part of the others, beside letters, digits, spaces and marks."""
    state = read_tokenizer(save(tmp_path, families[family]))
    alike = [(0x3410, 0x4db0), (0x4e10, 0x9ff0), (0xa010, 0xa480), (0xac10, 0xd790), (0xd800, 0xf8f0)]
    codes = [c for c in range(0x10000) if not any(a <= c < b for a, b in alike)]
    codes += [c for c in [*range(0x10000, 0x20000, 29), *range(0x20000, 0x110000, 4001)] if c not in NEW_DIGITS]
    pieces = [f'a{chr(c)}1{chr(c)} {chr(c)}!' for c in codes]
    same(state, reference(families[family]), (''.join(pieces[k:k + 500]) for k in range(0, len(pieces), 500)))


def test_composition():
    """NFC as tokenizers has it, for marks known since Unicode 9."""
    draw = random.Random(0)
    marks = [c for a, b in [(0x300, 0x370), (0x591, 0x5be), (0x64b, 0x660), (0x93c, 0x94e), (0x3099, 0x309b), (0x1d165, 0x1d170)] for c in range(a, b)]
    bases = [*range(0x61, 0x70), 0x3b1, 0x439, 0x915, 0x1100, 0x1161, 0x11a8, 0xac00, 0x304b, 0x1d157, 0x1e9b, 0x212b, 0xf900, 0x2f800]
    theirs = tokenizers.normalizers.NFC()
    changed = 0
    for _ in range(3000):
        text = ''.join(chr(draw.choice(marks if draw.random() < .6 else bases)) for _ in range(8))
        composed = normalized({'nfc': True}, text)
        assert composed == theirs.normalize_str(text), ascii(text)
        assert normalized({'nfc': False}, text) == text
        changed += composed != text
    assert changed > 1000


@pytest.mark.parametrize('family', ['qwen', 'smollm'])
def test_ids_in_any_order(family, families, tmp_path):
    """Ids that do not grow with the merges: they are found by the order of the merges, in both directions."""
    written = json.loads(json.dumps(families[family]))
    vocab = written['model']['vocab']
    ids = list(vocab.values())
    random.Random(1).shuffle(ids)
    written['model']['vocab'] = dict(zip(vocab, ids))
    for token in written['added_tokens']:
        token['id'] = written['model']['vocab'].get(token['content'], token['id'])
    state = read_tokenizer(save(tmp_path, written))
    assert not state['in_order']
    used = same(state, reference(written), [*ODD, *random_texts(2, 500)])
    assert not used & set(state['specials'].values())
    assert encoding_of(state).encode_ordinary('the') != encode(state, encoding_of(state), 'the')


def handmade(draw, n_merges):
    """Merges of three letters in no order at all: pairs that make the same token, tokens that nothing makes, pairs listed twice."""
    tokens = {letter: None for letter in 'abc'}
    merges = []
    for _ in range(n_merges):
        pair = draw.choice(list(tokens)), draw.choice(list(tokens))
        if len(''.join(pair)) <= 9:
            tokens[''.join(pair)] = None
            merges.append(list(pair))
    draw.shuffle(merges)
    merges += draw.choices(merges, k=2)
    for _ in range(3):
        tokens[''.join(draw.choices('abc', k=draw.randint(3, 7)))] = None
    ids = list(range(300))
    draw.shuffle(ids)
    letters = [letter for letter in BYTES if letter not in tokens]
    return dict(zip([*tokens, *letters], ids)), merges


@pytest.mark.parametrize('ignore_merges', [False, True])
def test_any_list_of_merges(ignore_merges, tmp_path):
    """However a list of merges came about, tiktoken merges as the list says; or the words that are looked up whole are refused."""
    draw = random.Random(0)
    outcomes = dict(read=0, refused=0, lists_out_of_order=0, left_out=0)
    for _ in range(50):
        vocab, merges = handmade(draw, draw.randint(2, 25))
        empty = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
        written = empty | {'pre_tokenizer': CUTS['gpt2'], 'model': empty['model'] | {'vocab': vocab, 'merges': merges, 'ignore_merges': ignore_merges}}
        try:
            state = read_tokenizer(save(tmp_path, written))
        except ValueError as e:
            assert ignore_merges and 'ignore_merges' in str(e)
            outcomes['refused'] += 1
            continue
        outcomes['read'] += 1
        outcomes['lists_out_of_order'] += not state['in_order']
        outcomes['left_out'] += len(state['order']) < len(vocab)
        texts = [''.join(draw.choices('abc', weights=draw.choice([(1, 1, 1), (8, 1, 1), (1, 6, 0)]), k=draw.randint(1, 40))) for _ in range(25)]
        same(state, reference(written), [*vocab, *texts, ''.join(draw.choices('abc', k=700))])
    assert outcomes['read'] > 10 and outcomes['lists_out_of_order'] > 10
    assert outcomes['refused'] > 15 if ignore_merges else outcomes['left_out'] > 30


def test_words_looked_up_whole(families, tmp_path):
    """Llama 3 looks a whole word up before it merges; without that, a token that no merge makes is in no text, though tiktoken looks up too."""
    written = families['llama']
    id = written['model']['vocab']['zqxjkv']
    for ignore_merges, alone in ((True, [id]), (False, None)):
        written = written | {'model': written['model'] | {'ignore_merges': ignore_merges}}
        state = read_tokenizer(save(tmp_path, written))
        encoding = encoding_of(state)
        ids = encode(state, encoding, 'zqxjkv')
        assert ids == alone or not ignore_merges and len(ids) > 2
        assert id not in encode(state, encoding, 'zqxjkva')
        assert decode(state, [id]) == 'zqxjkv'
        same(state, reference(written), [*ODD, *random_texts(3, 300)])


def test_lacking_bytes(tmp_path):
    """A vocabulary without some bytes, as SmolLM2's: they are dropped, and their neighbours merge."""
    written = trained('smollm', every_byte=False)
    state = read_tokenizer(save(tmp_path, written))
    lacking = bytes.fromhex(state['lacking'])
    assert 13 < len(lacking) < 200
    texts = [*ODD, *random_texts(4, 1500)]
    assert sum(any(byte in lacking for byte in text.encode()) for text in texts) > 300
    same(state, reference(written), texts)
    # where a token for what is unknown is named, the package gives it, a special one; here nothing changes
    unknown = written | {'model': written['model'] | {'unk_token': '<|im_end|>'}}
    lacks = next(text for text in texts if any(byte in lacking for byte in text.encode()))
    assert state['specials']['<|im_end|>'] in reference(unknown).encode(lacks).ids
    assert read_tokenizer(save(tmp_path, unknown)) | {'source_hash': ''} == state | {'source_hash': ''}
    # the middle of three bytes is dropped, and the outer two have a merge
    letters = {byte: letter for letter, byte in BYTES.items()}
    first, last = letters[0xe4], letters[0xad]
    vocab = {letter: k for k, letter in enumerate(BYTES) if letter != letters[0xb8]} | {first + last: 999}
    written['model'] |= {'vocab': vocab, 'merges': [[first, last]]}
    written['added_tokens'] = []
    state = read_tokenizer(save(tmp_path, written))
    assert encode(state, encoding_of(state), '\u4e2d') == [999] == reference(written).encode('\u4e2d').ids


@pytest.mark.parametrize('family', CUTS)
def test_no_text_is_a_special_token(family, families, tmp_path):
    """Not even their own: the package with added tokens would find them there. Those added and not special are not found either."""
    written = families[family]
    state = read_tokenizer(save(tmp_path, written))
    assert list(state['specials']) == SPECIALS and list(state['added']) == ['<tool_call>', '</tool_call>']
    texts = [*SPECIALS, '<tool_call>', *(f'a {x}\n{x}{x}' for x in (*SPECIALS, '<tool_call>'))]
    used = same(state, reference(written), texts)
    ids = {*state['specials'].values(), *state['added'].values()}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(written))
    found = {id for text in texts for id in theirs.encode(text, add_special_tokens=False).ids}
    assert not used & ids and ids - found == {state['added']['</tool_call>']}
    everything = [*range(len(state['tokens']))] + [len(state['tokens']), -1, 10 ** 9]
    assert SPECIALS[0] not in decode(state, everything) and '<tool_call>' in decode(state, everything)
    assert decode(state, state['specials'].values()) == ''
    theirs.encode_special_tokens = True  # the package's own way to leave special tokens alone
    for text in SPECIALS:
        assert encode(state, encoding_of(state), text) == theirs.encode(text, add_special_tokens=False).ids


def test_two_files(families, tmp_path):
    """vocab.json and merges.txt give what tokenizer.json gives; the pattern is that of the class; tokenizer.json comes first."""
    for family, name in (('qwen', 'Qwen2Tokenizer'), ('gpt2', 'GPT2TokenizerFast')):
        written = families[family]
        folder = tmp_path / family
        one = read_tokenizer(save(folder, written))
        reference(written).model.save(str(folder))
        assert (folder / 'merges.txt').read_text().startswith('#version')
        decoder = {str(token['id']): {key: value for key, value in token.items() if key != 'id'} for token in written['added_tokens']}
        save(folder, written, tokenizer_class=name, added_tokens_decoder=decoder)
        assert read_tokenizer(folder) == one
        (folder / 'tokenizer.json').unlink()
        two = read_tokenizer(folder)
        files = b''.join((folder / file).read_bytes() for file in ('vocab.json', 'merges.txt', 'tokenizer_config.json'))
        assert two.pop('source_hash') == hashlib.sha256(files).hexdigest() != one.pop('source_hash')
        assert two == one
        # without the first line, with other ends of lines, and merges that are strings in tokenizer.json
        lines = (folder / 'merges.txt').read_text().split('\n')[1:]
        (folder / 'merges.txt').write_bytes('\r\n'.join(lines).encode())
        assert read_tokenizer(folder)['order'] == one['order']
        merges = [' '.join(pair) for pair in written['model']['merges']]
        assert read_tokenizer(save(tmp_path / 'strings', written | {'model': written['model'] | {'merges': merges}}))['order'] == one['order']


def test_what_stands_beside(families, tmp_path):
    """Begin, end and padding, by name or by description; they are special whatever the list says; the template of a chat, in three forms; the hash."""
    written = json.loads(json.dumps(families['qwen']))
    written['added_tokens'][2]['special'] = False
    folder = save(tmp_path, written)
    state = read_tokenizer(folder)
    assert (state['bos'], state['eos'], state['pad']) == (None, None, None)
    assert '<|im_end|>' in state['added'] and state['source_hash'] == hashlib.sha256((folder / 'tokenizer.json').read_bytes()).hexdigest()
    save(tmp_path, written, bos_token=None, eos_token='<|im_end|>', pad_token={'content': '<|endoftext|>'})
    state = read_tokenizer(folder)
    ids = {token['content']: token['id'] for token in written['added_tokens']}
    assert (state['bos'], state['eos'], state['pad']) == (None, ids['<|im_end|>'], ids['<|endoftext|>'])
    assert '<|im_end|>' in state['specials'] and '<|im_end|>' not in state['added'] and state['tokens'][state['eos']] == ''
    assert state['name'] == 'pretrained'


def changed(written, path, value):
    """A copy in which what lies at a path is something else, or is gone."""
    copy = json.loads(json.dumps(written))
    *way, last = path
    inner = copy
    for key in way:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copy


METASPACE = {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'first', 'split': False}
REFUSED = [
    (['model', 'type'], 'Unigram', 'type Unigram; expected a BPE of bytes. SentencePiece tokenizers'),
    (['model', 'type'], 'WordPiece', 'type WordPiece'),
    (['model', 'byte_fallback'], True, 'BPE with byte_fallback; expected a BPE of bytes. SentencePiece'),
    (['model', 'dropout'], .1, 'dropout 0.1; expected none'),
    (['model', 'end_of_word_suffix'], '</w>', "end_of_word_suffix '</w>'"),
    (['model', 'continuing_subword_prefix'], '##', "continuing_subword_prefix '##'"),
    (['model', 'vocab'], None, "damaged.*KeyError: 'vocab'"),
    (['model', 'merges'], None, "damaged.*KeyError: 'merges'"),
    (['model'], None, "damaged.*KeyError: 'model'"),
    (['model'], [1], 'damaged.*AttributeError'),
    (['model', 'vocab'], {}, 'expected two tokens that make one'),
    (['model', 'vocab', '!'], 5000000, "token '!' has the id 5000000; expected 0 to"),
    (['model', 'vocab', '!'], -1, "token '!' has the id -1; expected 0 to"),
    (['model', 'vocab', '!'], 1.0, "token '!' has the id 1.0; expected 0 to"),
    (['model', 'vocab', '!'], True, "token '!' has the id True; expected 0 to"),
    (['model', 'vocab', '!'], 7, 'has the id 7, as .* has'),
    (['model', 'vocab', 'x' * 1001], 900, 'of 1001 letters; expected at most 1000'),
    (['model', 'vocab', '\ud800'], 9000, 'damaged.*UnicodeEncodeError'),
    (['model', 'merges', 3], 'a b c', 'merge 3 is "a b c"; expected two tokens'),
    (['model', 'merges', 3], ['a'], 'merge 3 is .*; expected two tokens'),
    (['model', 'merges', 3], ['qq', 'a'], 'merge 3 is .*; expected two tokens'),
    (['model', 'merges', 3], ['q', '~'], 'merge 3 is .*; expected two tokens'),
    (['model', 'merges', 3], 5, 'damaged.*TypeError'),
    (['added_tokens', 0, 'id'], 3, 'has the id 3, as'),
    (['added_tokens', 0, 'content'], '!', "token '!' has the id .*, and 0 in the vocabulary"),
    (['added_tokens', 0, 'special'], None, "damaged.*KeyError: 'special'"),
    (['added_tokens'], 5, 'damaged.*TypeError'),
    (['added_tokens', 0], {'id': 0, 'content': '!', 'special': True}, "special token '!' is one that text encodes to"),
    (['normalizer'], {'type': 'NFKC'}, 'normalizer {"type": "NFKC"}; expected none or NFC'),
    (['pre_tokenizer'], METASPACE, 'pre_tokenizer {"type": "Metaspace".*SentencePiece'),
    (['pre_tokenizer'], None, "damaged.*KeyError: 'pre_tokenizer'"),
    (['pre_tokenizer'], BYTE_LEVEL | {'add_prefix_space': True}, '"add_prefix_space": true.*with add_prefix_space false'),
    (['pre_tokenizer'], sequence({'type': 'Digits', 'individual_digits': False}, BYTE_LEVEL), 'expected that of'),
    (['pre_tokenizer'], sequence(SPLIT | {'pattern': {'Regex': r'\w+'}}, BYTE_LEVEL | {'use_regex': False}), 'expected that of'),
    (['pre_tokenizer'], sequence(SPLIT | {'pattern': {'Regex': QWEN_REGEX}, 'behavior': 'Removed'}, BYTE_LEVEL | {'use_regex': False}), 'expected that of'),
    (['pre_tokenizer'], sequence(SPLIT | {'pattern': {'Regex': QWEN_REGEX}}, BYTE_LEVEL), 'expected that of'),
    (['pre_tokenizer'], sequence(), 'damaged.*IndexError'),
]


@pytest.mark.parametrize('path,value,message', REFUSED, ids=[f'{".".join(map(str, path))}-{k}'[:60] for k, (path, _, _) in enumerate(REFUSED)])
def test_other_kinds_and_damage_are_refused(path, value, message, small, tmp_path):
    """The message names the file, what was found and what was expected."""
    folder = save(tmp_path / 'it', changed(small, path, value))
    with pytest.raises(ValueError, match=f'tokenizer.json: .*{message}'):
        read_tokenizer(folder)


def test_files_that_are_no_tokenizer(families, tmp_path):
    """Damaged files, those too large, folders without; what the files beside them say and cannot be."""
    folder = save(tmp_path / 'it', families['qwen'], eos_token='<|im_end|>')
    file = folder / 'tokenizer.json'
    whole = file.read_bytes()
    for data, message in ((whole[:-9], 'not JSON'), (b'[1]', 'a list; expected an object'), (b'\xff\xfe', 'not text in UTF-8'), (b'[' * 100000, 'not JSON'),
                          (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', 'Git LFS')):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f'tokenizer.json: .*{message}'):
            read_tokenizer(folder)
    with open(file, 'wb') as f:
        f.truncate(64_000_001)  # takes no room on the disk
    with pytest.raises(ValueError, match='tokenizer.json: 64,000,001 bytes; expected at most 64,000,000'):
        read_tokenizer(folder)
    file.write_bytes(whole)
    words = changed(changed(families['qwen'], ['model', 'vocab'], {'ab': 0}), ['model', 'merges'], [])
    with pytest.raises(ValueError, match='tokenizer.json: no token of a single byte; expected a BPE of bytes'):
        read_tokenizer(save(folder, words, x=1))
    for config, message in ((dict(pad_token='[PAD]'), "no token '\\[PAD\\]', the pad_token"), (dict(add_prefix_space=True), 'says add_prefix_space; expected false'),
                            (dict(eos_token={}), "KeyError: 'content'")):
        with pytest.raises(ValueError, match=f'tokenizer.json: .*{message}'):
            read_tokenizer(save(folder, families['qwen'], **config))
    file.unlink()
    (folder / 'tokenizer.model').write_bytes(b'x')
    with pytest.raises(ValueError, match='it: expected tokenizer.json, or vocab.json, .*; found tokenizer.model, .*SentencePiece tokenizers .Llama 2'):
        read_tokenizer(folder)
    reference(families['qwen']).model.save(str(folder))
    for config, message in ((dict(tokenizer_class='LlamaTokenizer'), 'says LlamaTokenizer; expected Qwen2Tokenizer or GPT2Tokenizer'), (dict(x=1), "KeyError: 'tokenizer_class'"),
                            (dict(tokenizer_class='Qwen2Tokenizer', added_tokens_decoder={'x': dict(content='x', special=True)}), "has the id 'x'"),
                            (dict(tokenizer_class='Qwen2Tokenizer', added_tokens_decoder={'9' * 5000: dict(content='x', special=True)}), "has the id '999"),
                            (dict(tokenizer_class='Qwen2Tokenizer', added_tokens_decoder=[1]), 'AttributeError')):
        (folder / 'tokenizer_config.json').write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f'vocab.json.*: .*{message}'):
            read_tokenizer(folder)


def test_a_special_token_that_merges_make(families, tmp_path):
    """It is refused: a question could type it. One that is a whole word of Llama 3's and no more is left out of the words."""
    written = json.loads(json.dumps(families['gpt2']))
    token = ''.join(written['model']['merges'][40])
    written['added_tokens'].append(written['added_tokens'][0] | {'id': written['model']['vocab'][token], 'content': token})
    with pytest.raises(ValueError, match='the special token .* is one that text encodes to'):
        read_tokenizer(save(tmp_path, written))
    written['added_tokens'][-1]['special'] = False
    state = read_tokenizer(save(tmp_path, written))
    same(state, reference(written), [token, *ODD])
    written = json.loads(json.dumps(families['llama']))
    id = written['model']['vocab']['zqxjkv']
    assert encode(read_tokenizer(save(tmp_path, written)), encoding_of(read_tokenizer(tmp_path)), 'zqxjkv') == [id]
    written['added_tokens'].append(written['added_tokens'][0] | {'id': id, 'content': 'zqxjkv'})
    state = read_tokenizer(save(tmp_path, written))
    assert state['specials']['zqxjkv'] == id and id not in encode(state, encoding_of(state), 'zqxjkv')


def test_the_letters_of_bytes():
    assert set(BYTES) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTES.values()) == list(range(256))
