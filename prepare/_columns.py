"""
Tables of other people, whatever the file: what their columns may be called and hold, checked once a file, and
the rows of a dataset that a row of them makes. `table` and `parquet` read files; both ask here.
"""

import re
from collections import Counter
from functools import lru_cache

import pyarrow as pa

from plumbing.console import cut
from plumbing.tables import file_problem, files_in, named
from prepare import turns

TEXT = ('text',)
TEXTS = ('text', 'list of text')
TALK = ('list of object', 'object')
SCALAR = ('text', 'number')
# what we call a column: (what a file may call it, the first that is there counts; what it may hold)
COLUMNS = dict(
    image=(('image', 'image_bytes', 'jpg', 'png', 'webp', 'img', 'picture', 'image.bytes', 'images',
            'image_path', 'img_path', 'image_file', 'file_name', 'filename', 'filepath'),
           ('text', 'bytes', 'object', 'list of text', 'list of bytes', 'list of object')),
    sound=(('sound',), ('text', 'bytes', 'object')),
    question=(('question', 'query', 'prompt'), TEXT),
    answer=(('answer', 'answers', 'multiple_choice_answer', 'label'), (*TEXTS, 'list of object')),
    caption=(('caption', 'captions', 'text', 'title'), TEXTS),
    talk=(('texts', 'conversations', 'conversation'), TALK),
    messages=(('messages',), (*TALK, 'list of text')),
    sample_id=(('sample_id', 'question_id', 'id', 'key'), SCALAR),
    type=(('type', 'question_type', 'answer_type', 'source'), SCALAR),
    group=(('group',), SCALAR),
    status=(('status',), TEXT),
)


@lru_cache(1000)
def plain_name(name):
    """The name of a column without what programs do to it: ' Sample ID' and sampleId are sample_id."""
    return re.sub(r'[\s_"-]', '', name).lower()


@lru_cache(1000)
def columns_of(names, kinds=None):
    """What we call columns, and what they are called in a file.

    Shapes: names, a tuple; kinds, what each holds, in words, where that is known -> {key: name}, without the
        keys that there are no columns for
    """
    kinds = kinds or (None,) * len(names)
    called = {}
    for name, kind in zip(names, kinds):
        called.setdefault(plain_name(name), (name, kind))
    columns = {}
    for key, (aliases, allowed) in COLUMNS.items():
        for alias in aliases:
            name, kind = called.get(plain_name(alias), (None, None))
            kind = kind and kind.split(':')[0]
            if name is not None and key not in columns and kind in (None, 'nothing', *allowed):
                columns[key] = name
    return columns


def check_columns(path, names, kinds, hint=''):
    """-> as `columns_of`. Raises: ValueError where a file lacks columns that it takes to make rows, told once
    and not at every row."""
    found = ', '.join(map(with_kind, names[:20], kinds))
    if len(names) > 20:
        found += f', ... ({len(names)} columns)'
    known = {plain_name(alias) for aliases, _ in COLUMNS.values() for alias in aliases}
    counts = Counter(map(plain_name, names))
    if any(counts[name] > 1 for name in known):
        raise ValueError(f'{path}: two columns have the same name; it has {found}')
    columns = columns_of(tuple(names), tuple(kinds))
    has_texts = 'caption' in columns or 'talk' in columns or 'messages' in columns
    has_texts = has_texts or 'question' in columns and 'answer' in columns
    has_media = 'image' in columns or 'sound' in columns
    if not has_media or not has_texts:
        lacking = 'image' if not has_media else 'question with answer, and no caption,'
        has_urls = {'url', 'imageurl', 'urls', 'imageurls'} & set(counts)
        if has_urls and lacking == 'image':
            hint = '; for URLs see python data.py pixmo, or fetch them with img2dataset'
        raise ValueError(f'{path}: no column {lacking} that can be used; it has {found or "none"}; expected '
                         f'image, and question and answer, or caption, or a talk in texts, conversations or '
                         f'messages{wrong_kinds(names, kinds, columns)}{hint}')
    return columns


def wrong_kinds(names, kinds, columns):
    """What a message says of columns of a known name that hold something else than they should, or ''."""
    said = ''
    for key, name in columns_of(tuple(names)).items():
        if columns.get(key) != name:
            _, allowed = COLUMNS[key]
            said += f'; {cut(name)} is {kinds[names.index(name)]}, expected {" or ".join(allowed)}'
    return said


def with_kind(name, kind):
    return cut(name) if kind in ('text', None) else f'{cut(name)} ({kind})'


def kind_of_type(type):
    """What a column of a parquet file holds, in the words of COLUMNS, a colon, the name of its type."""
    is_ = pa.types
    if is_.is_dictionary(type):
        return kind_of_type(type.value_type)
    if is_.is_string(type) or is_.is_large_string(type) or is_.is_string_view(type):
        return 'text'
    if is_.is_binary(type) or is_.is_large_binary(type) or is_.is_fixed_size_binary(type):
        return 'bytes'
    if is_.is_list(type) or is_.is_large_list(type) or is_.is_fixed_size_list(type):
        return f'list of {kind_of_type(type.value_type)}'
    if is_.is_struct(type):
        return 'object'
    if is_.is_null(type):
        return 'nothing'
    return f'number: {type}' if is_.is_primitive(type) else f'other: {cut(type)}'


def kind_of(values):
    """What a column of a file of JSON holds, told by some of its values; None where they differ."""
    kinds = {kind_of_value(value) for value in values} - {'nothing'}
    if len(kinds) > 1:
        return None
    return kinds.pop() if kinds else 'nothing'


def kind_of_value(value):
    if isinstance(value, list):
        return f'list of {kind_of(value)}' if value else 'nothing'
    if value is None:
        return 'nothing'
    return {str: 'text', dict: 'object'}.get(type(value), f'number: {type(value).__name__}')


def rows_of(values, columns, name, folder):
    """Yields the rows that a row of a table makes: one for every turn, or one that says what is wrong.

    values: {column: value}, or a ValueError that says why there is none; name: what to call the row where it
    has no name of its own; folder: where paths of pictures start
    """
    if isinstance(values, ValueError):
        yield dict(bad=str(values), sample_id=name)
        return
    row = {key: values.get(columns.get(key)) for key in COLUMNS}
    row = {key: None if value == '' else value for key, value in row.items()}  # an empty field of a CSV file
    name = named(row['sample_id'], name)
    image = row['image']
    if isinstance(image, list):
        if len(image) > 1:
            yield dict(bad=f'{len(image)} pictures in one row', sample_id=name)
            return
        image = image[0] if image else None
    if isinstance(image, str):  # beside another delimiter than a comma there often is a space
        image = image.strip()
    if image is None and row['status'] not in (None, 'success'):
        yield dict(missing=f'not fetched by img2dataset: {cut(row["status"])}', sample_id=name)
        return
    files = files_in(dict(image=image, sound=row['sound']), folder)
    if problem := file_problem(files):
        yield dict(bad=problem, sample_id=name)
        return
    answer = row['answer']
    if isinstance(answer, list):  # of VQA v2: {answer, answer_id}
        answer = [one.get('answer') if isinstance(one, dict) else one for one in answer]
    try:
        talk = list(turns(row['question'], answer, row['talk'] or row['messages']))
    except ValueError as e:
        yield dict(bad=str(e), sample_id=name)
        return
    for k, (question, answer) in enumerate(talk):
        yield dict(
            **files,
            question=question,
            answer=answer,
            caption=row['caption'],
            type=row['type'],
            group=row['group'],
            sample_id=f'{name}-{k}' if k else name,
        )
