"""
Tokenizers that others trained: the byte-level BPE of a Hugging Face folder of Llama 3, SmolLM2, Qwen2 or
Qwen3, so that tiktoken runs it. Ordinary text becomes the ids that the package tokenizers gives it.

tokenizers merges the pair of tokens that comes first in a list of pairs; tiktoken the pair whose joined text
is the token of the lowest rank. They agree where a token's rank is the place, in the list, of the one pair
that ever makes it: the last merge of its own text. No other pair does, because what lies between two borders
that no merge has crossed is merged as it would be alone. A token that merges do not make of its own text is
made of no text, and has no rank.
"""

import hashlib
import json
import unicodedata
from pathlib import Path

import regex
import tiktoken

from plumbing.files import refuse_impostor

LARGEST = 64_000_000  # bytes of a file
MOST_IDS = 2 ** 20
LONGEST = 1000  # letters of a token: the time that its merges take grows with their square
NEVER = float('inf')
NOT_HERE = 'SentencePiece tokenizers (Llama 2, Mistral, Gemma) are not read here'

# How a text is cut into words. SmolLM2 cuts out each digit first, and what is left as GPT-2 does: no space
# joins a digit, and none of those before one is held back for it
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r'\s+(?!\S)|\s+')
LLAMA = QWEN.replace(r'|\p{N}|', r'|\p{N}{1,3}|')


def split(pattern):
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


# what stands before the step ByteLevel in tokenizer.json, and whether that step cuts too
STEPS = {
    GPT2: ([], True),
    SMOLLM: ([{'type': 'Digits', 'individual_digits': True}], True),
    QWEN: ([split(QWEN)], False),
    LLAMA: ([split(LLAMA)], False),
}
# of a folder without tokenizer.json: the pattern, and whether text is composed (NFC)
CLASSES = {'Qwen2Tokenizer': (QWEN, True), 'GPT2Tokenizer': (GPT2, False)}


def byte_letters():
    """The letter that stands for each byte in the files -> {letter: byte}. Source: GPT-2, encoder.py."""
    shown = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + k): byte for k, byte in enumerate(hidden)}


BYTES = byte_letters()


# ----------------------------------------------------------------------------
# a state and its use

def encoding_of(state):
    """-> tiktoken.Encoding for `encode`.

    Its numbers are ids where the ids grow with the merges, as in all the families named above; otherwise they
    are places in state['order'], and special tokens lie behind these.
    """
    numbers, specials = state['order'], state['specials']
    if not state['in_order']:
        numbers = range(len(state['order']))
        specials = {text: len(state['tokens']) + id for text, id in specials.items()}
    ranks = {bytes.fromhex(state['tokens'][id]): n for id, n in zip(state['order'], numbers)}
    return tiktoken.Encoding('pretrained', pat_str=state['pattern'], mergeable_ranks=ranks,
                             special_tokens=specials)


def normalized(state, text):
    """The text as the tokenizer wants it: composed (NFC), or as it is."""
    return unicodedata.normalize('NFC', text) if state['nfc'] else text


def encode(state, encoding, text):
    """The ids of a text, none of them a special token's; `encoding` is that of the state.

    Bytes that are not in the vocabulary, as a few are not in SmolLM2's, are dropped before the merges.
    """
    text = normalized(state, text)
    lacking = bytes.fromhex(state['lacking'])
    data = text.encode(errors='replace')
    if data.translate(None, lacking) == data:
        numbers = encoding.encode_ordinary(text)
    else:  # a word is no text without them, and tiktoken takes bytes a word at a time
        words = [word.encode(errors='replace') for word in regex.findall(state['pattern'], text)]
        kept = [word.translate(None, lacking) for word in words]
        numbers = [n for word in kept if word for n in encoding._encode_single_piece(word)]
    if state['in_order']:
        return numbers
    return [state['order'][n] for n in numbers]


def decode(state, ids):
    """The text of ids; special tokens, and ids beyond the vocabulary, are left out."""
    tokens = state['tokens']
    return b''.join(bytes.fromhex(tokens[id]) for id in ids if 0 <= id < len(tokens)).decode(errors='replace')


# ----------------------------------------------------------------------------
# from the files to a state

def read_tokenizer(folder):
    """Reads tokenizer.json, or vocab.json with merges.txt -> state, plain types that fit into a checkpoint.

    'tokens': hex strings by id, '' of special ones; as many as the vocabulary has ids. 'specials' {text: id}:
    the tokens that are called special, and bos, eos and pad; no text encodes to them. 'added' {text: id}:
    those added but not special, such as Qwen's <tool_call>; they too are ordinary characters in a text.
    'order': the ids that texts encode to, by their merges. 'bos', 'eos', 'pad': ids or None.
    'source_hash': sha256 of tokenizer.json, or of vocab.json, merges.txt and tokenizer_config.json in a row.

    Unlike tokenizers, it never gives an unk_token for a dropped byte, and does not truncate or pad; and new
    characters may be treated otherwise: digits of Unicode 17 in SmolLM2's, any of it where bytes are dropped,
    and where text is composed the combining marks that came with Unicode 10 or later.
    Raises: ValueError naming the file: damaged, or of another kind.
    """
    folder = Path(folder)
    files = [folder / 'tokenizer.json']
    if not files[0].is_file():
        files = [folder / name for name in ('vocab.json', 'merges.txt', 'tokenizer_config.json')]
    if not all(file.is_file() for file in files):
        found = ', '.join(sorted(file.name for file in folder.glob('*'))[:8]) or 'nothing'
        raise ValueError(f'{folder}: expected tokenizer.json, or vocab.json, merges.txt and '
                         f'tokenizer_config.json; found {found}. {NOT_HERE}')
    config = {}
    if (folder / 'tokenizer_config.json').is_file():
        config = read_object(folder / 'tokenizer_config.json')
    try:
        read = from_one_file if len(files) == 1 else from_parts
        state = state_of(files[0], config, *read(*files[:2], config))
    except (AttributeError, LookupError, TypeError, UnicodeEncodeError) as e:
        names = ', '.join(str(file) for file in files)
        raise ValueError(f'{names}: damaged, or of another form ({type(e).__name__}: {e})') from None
    state['source_hash'] = hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()
    return state


def read_text(path):
    """Raises: ValueError naming the file."""
    refuse_impostor(path)
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f'{path}: {size:,} bytes; expected at most {LARGEST:,}')
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise ValueError(f'{path}: not text in UTF-8: {e}') from None


def read_object(path):
    """A JSON file -> dict. Raises: ValueError naming the file."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: not JSON: {e}') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path}: a {type(value).__name__}; expected an object')
    return value


def from_one_file(file, config):
    """tokenizer.json -> (model, added tokens, pattern, whether text is composed). Raises: ValueError."""
    written = read_object(file)
    model = written['model']
    kind = model.get('type', 'BPE')
    if kind != 'BPE' or model.get('byte_fallback'):
        kind += ' with byte_fallback' if model.get('byte_fallback') else ''
        raise ValueError(f'{file}: a model of type {kind}; expected a BPE of bytes. {NOT_HERE}')
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(key):
            raise ValueError(f'{file}: {key} {model[key]!r}; expected none')
    normalizer = written.get('normalizer')
    if normalizer not in (None, {'type': 'NFC'}):
        raise ValueError(f'{file}: normalizer {short(normalizer)}; expected none or NFC. {NOT_HERE}')
    pattern = pattern_of(file, written['pre_tokenizer'])
    return model, written.get('added_tokens') or [], pattern, normalizer is not None


def pattern_of(file, cut):
    """The pattern that cuts a text into the words that a pre_tokenizer makes. Raises: ValueError."""
    steps = cut['pretokenizers'] if cut['type'] == 'Sequence' else [cut]
    last = steps[-1]
    if last['type'] == 'ByteLevel' and last['add_prefix_space'] is False:
        for pattern, known in STEPS.items():
            if known == (steps[:-1], last.get('use_regex', True)):
                return pattern
    raise ValueError(f'{file}: pre_tokenizer {short(cut)}; expected that of GPT-2, SmolLM2, Qwen2 or Llama 3 '
                     f'with add_prefix_space false. {NOT_HERE}')


def from_parts(vocab, merges, config):
    """vocab.json and merges.txt -> (model, added tokens, pattern, whether text is composed).

    Raises: ValueError.
    """
    kind = config['tokenizer_class'].removesuffix('Fast')
    if kind not in CLASSES:
        raise ValueError(f'{vocab}: tokenizer_config.json beside it says {kind}; expected '
                         f'{" or ".join(CLASSES)}, or a tokenizer.json')
    lines = read_text(merges).replace('\r\n', '\n').split('\n')
    if lines[0].startswith('#version'):
        lines = lines[1:]
    model = {'vocab': read_object(vocab), 'merges': [line for line in lines if line]}
    listed = config.get('added_tokens_decoder', {})
    added = []
    for id, token in listed.items():
        is_number = id.isdecimal() and len(id) < 10
        added.append({**token, 'id': int(id) if is_number else id})
    return model, added, *CLASSES[kind]


def state_of(file, config, model, added, pattern, nfc):
    """-> state, but for what is not in it of the folder. Raises: ValueError."""
    if config.get('add_prefix_space'):
        raise ValueError(f'{file}: tokenizer_config.json beside it says add_prefix_space; expected false')
    vocab = model['vocab']
    texts = texts_by_id(file, vocab, added)
    ids = {text: id for id, text in texts.items()}
    roles = {role: id_of_role(file, config, f'{role}_token', ids) for role in ('bos', 'eos', 'pad')}
    special = {token['id'] for token in added if token['special']} | set(roles.values())
    order, in_order = order_of(file, model, special)
    tokens = [''] * (max(texts) + 1)
    for id, text in texts.items():
        data = bytes_of(text, text in vocab)
        if id not in special:
            tokens[id] = data.hex()
    return {
        'name': 'pretrained',
        'tokens': tokens,
        'specials': {text: id for id, text in texts.items() if id in special},
        'added': {token['content']: token['id'] for token in added if token['id'] not in special},
        'pattern': pattern,
        'nfc': nfc,
        'order': order,
        'in_order': in_order,
        'lacking': bytes(byte for letter, byte in BYTES.items() if letter not in vocab).hex(),
        **roles,
    }


def texts_by_id(file, vocab, added):
    """-> {id: token as the file writes it}. Raises: ValueError."""
    texts = {}
    for text, id in [*vocab.items(), *((token['content'], token['id']) for token in added)]:
        what = f'{file}: token {text[:40]!r}'
        if len(text) > LONGEST:
            raise ValueError(f'{what}... of {len(text)} letters; expected at most {LONGEST}')
        if type(id) is not int or not 0 <= id < MOST_IDS:
            raise ValueError(f'{what} has the id {id!r}; expected 0 to {MOST_IDS - 1}')
        if texts.setdefault(id, text) != text:
            raise ValueError(f'{what} has the id {id}, as {texts[id][:40]!r} has')
        if vocab.get(text, id) != id:
            raise ValueError(f'{what} has the id {id}, and {vocab[text]} in the vocabulary')
    return texts


def id_of_role(file, config, role, ids):
    """The id of bos_token, say, of tokenizer_config.json, or None. Raises: ValueError."""
    token = config.get(role)
    text = token['content'] if isinstance(token, dict) else token
    if text is not None and text not in ids:
        raise ValueError(f'{file}: no token {text!r}, the {role} of tokenizer_config.json')
    return ids.get(text)


def bytes_of(text, in_letters):
    """The bytes of a token; those of its own text where it is not in letters that stand for bytes."""
    if in_letters and all(letter in BYTES for letter in text):
        return bytes(BYTES[letter] for letter in text)
    return text.encode()


def order_of(file, model, special):
    """The ids that texts encode to, by their merges -> (list, whether ids grow with the merges).

    Raises: ValueError where a text would encode to a special token, or where whole words are looked up before
        they are merged (ignore_merges, Llama 3) and tiktoken could not tell such words from merges.
    """
    vocab = model['vocab']
    places = places_of_merges(file, vocab, model['merges'])
    letters = [letter for letter in BYTES if letter in vocab]
    if not letters:
        raise ValueError(f'{file}: no token of a single byte; expected a BPE of bytes. {NOT_HERE}')
    in_letters = [token for token in vocab if len(token) > 1 and set(token).issubset(letters)]
    last = {token: last_merge(token, places) for token in in_letters}
    rank = {token: places[pair] for token, pair in last.items() if pair in places}
    made = sorted(rank, key=rank.get)
    for token in letters + made:
        if vocab[token] in special:
            raise ValueError(f'{file}: the special token {token!r} is one that text encodes to')
    whole = []
    if model.get('ignore_merges'):
        whole = [token for token in last if token not in rank and vocab[token] not in special]
    for token in whole:
        # tiktoken would merge two pieces of it inside a longer word: it asks for their text, not for a pair
        if len(last[token]) == 2 or len(letters) < len(BYTES):
            raise ValueError(f'{file}: ignore_merges, and the token {token!r} is merged to {last[token]}; '
                             'expected itself, or three pieces or more, and a token for every byte')
    ids = [vocab[token] for token in made]
    if ids == sorted(ids):  # what no merge makes may stand anywhere
        return sorted(vocab[token] for token in letters + made + whole), True
    return [vocab[token] for token in letters + made + whole], False


def places_of_merges(file, vocab, merges):
    """-> {(token, token): place in the list}, of a pair that is listed twice the last. Raises: ValueError."""
    places = {}
    for place, merge in enumerate(merges):
        pair = tuple(merge.split(' ') if isinstance(merge, str) else merge)
        if len(pair) != 2 or not {*pair, ''.join(pair)} <= vocab.keys():
            raise ValueError(f'{file}: merge {place} is {short(merge)}; expected two tokens that make one')
        places[pair] = place
    return places


def last_merge(token, places):
    """The two pieces that merges leave of a token's own text before the last one; more, where they end."""
    pieces = list(token)
    while len(pieces) > 2:
        found = [places.get(pair, NEVER) for pair in zip(pieces, pieces[1:])]
        first = min(found)
        if first == NEVER:
            break
        k = found.index(first)
        pieces[k:k + 2] = [pieces[k] + pieces[k + 1]]
    return tuple(pieces)


def short(value):
    return json.dumps(value)[:300]


# ----------------------------------------------------------------------------
# in the place of data.Tokenizer

CHATS = {  # a special token that the family has: what a question stands in, and what ends an answer
    '<|im_start|>': ('<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n', '<|im_end|>'),
    '<|start_header_id|>': (
        '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n', '<|eot_id|>'),
}
PADDING = ('<|endoftext|>', '<|finetune_right_pad_id|>', '<|end_of_text|>')  # in no prompt of theirs


def with_prompt(state, prompt=None):
    """The state, and what a question stands in: `prompt`, or None for what the family is used to. Special
    tokens that stand in the prompt are such. Raises: ValueError."""
    known = next((chat for mark, chat in CHATS.items() if {mark, chat[1]} <= state['specials'].keys()), None)
    ids = {id: text for text, id in state['specials'].items()}
    ends = ids.get(state['eos'])
    if known and (not prompt or known[1] in prompt or ends is None):
        ends = known[1]
    prompt = prompt or (known[0] if known else '{question}\n')
    if ends is None:
        raise ValueError('a tokenizer that names no eos_token: nothing could end an answer')
    padding = [text for text in (ids.get(state['pad']), *PADDING, *state['specials'])
               if text in state['specials'] and text not in prompt and text != ends]
    if not padding:
        raise ValueError(f'prompt={prompt}: it has all special tokens: none is left for padding')
    return state | dict(prompt=prompt, end=state['specials'][ends], padding=state['specials'][padding[0]])


class PretrainedTokenizer:
    """A pretrained tokenizer with the names of data.Tokenizer. A question stands in a prompt, whose last
    token takes the place of <bos>."""

    lower_case = False

    def __init__(self, state):
        self.state = state
        self.bpe = encoding_of(state)
        before, after = state['prompt'].split('{question}')
        self.begin, self.joined = self.marked(before)
        ids, rest = self.marked(after)  # on its own: the last token is always the same
        after = ids + self.encode(rest)
        if not after:
            raise ValueError(f"prompt={state['prompt']}: expected something behind the question, whose last "
                             'token begins the answer')
        self.behind = after[:-1]
        self.tail = len(self.behind)  # tokens behind the question
        self.pad_id = state['padding']
        self.bos_id = after[-1]
        self.eos_id = state['end']
        self.vocab_size = len(state['tokens'])

    def encode(self, text):
        return encode(self.state, self.bpe, text)

    def encode_question(self, text):
        """The tokens of the prompt around a question, but for the last one."""
        return self.begin + self.encode(self.joined + text) + self.behind

    def marked(self, prompt):
        """A piece of the prompt, whose special tokens are such -> the tokens up to the last of these, and the
        text behind it, to be encoded as a whole with what follows."""
        marks = self.state['specials'] | self.state['added']  # in a prompt these are meant too, as <think> is
        specials = sorted(marks, key=len, reverse=True)
        *parts, last = regex.split(f"({'|'.join(map(regex.escape, specials))})", prompt)
        ids = []
        for part in parts:
            ids += [marks[part]] if part in marks else self.encode(part)
        return ids, last

    def piece(self, id):
        """What a token says, as text."""
        return decode(self.state, [id])

    def decode(self, ids):
        """The text of ids up to the end of the answer."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
        return decode(self.state, ids).strip()
