"""What a run leaves: its table, predictions.jsonl, samples.png and metrics.json."""

import json
import random
from functools import partial
from pathlib import Path

from PIL import Image

from plumbing.console import printable
from plumbing.files import write_whole
from plumbing.pictures import picture_sheet, rgb_picture
from plumbing.plots import draw_curves, harmless
from plumbing.ranks import rank_and_world
from plumbing.sounds import spectrum_picture

TYPES = ('color', 'shape', 'exist', 'count', 'compare', 'relation')  # the order of tables; others follow


def type_order(type):
    """Sorts question types: those of the shapes in their order, then others by name, captions last."""
    if type in TYPES:
        return TYPES.index(type), type
    return len(TYPES) + (type == 'describe'), type


def result_table(metrics):
    """The result by question type, as text; captions last."""
    merged = metrics.get('merged')
    names = dict(em='em', equal='equal', f1='f1', vqa='vqa', token_accuracy='token accuracy', passes='passes')
    columns = {key: name for key, name in names.items() if key in metrics and (key != 'equal' or merged)}
    width = max(12, *map(len, metrics['by_type']))

    def line(name, m):
        cells = [f'{m[key]:.3f}' if key in m else '-    ' for key in columns]
        return ' | '.join([f'{printable(name):{width}}', f"{m['n']:6}", *cells])

    head = ' | '.join([f"{'type':{width}}", f"{'n':>6}", *(f'{name:5}' for name in columns.values())])
    lines = [head, '-' * len(head)]
    types = [type for type in metrics['by_type'] if type != 'describe']
    if types != ['all']:  # what rows without a type are called
        lines += [line(type, metrics['by_type'][type]) for type in types]
    lines.append(line('all', metrics))
    if len(types) > 1:
        lines.append(f"{'mean of types':{width + 9}} | {metrics['em_types']:.3f}")
    lines += [line(type, m) for type, m in metrics['by_type'].items() if type == 'describe']
    if merged:
        lines.append(f"em takes some of these answers for equal: {printable('; '.join(merged[:3]))}"
                     f"{'; ...' if len(merged) > 3 else ''}; the column equal compares the very strings")
    return '\n'.join(lines)


def picture_of(rows, i):
    """The picture of a row, or of its sound's spectrum where it has none. Raises: ValueError, naming it."""
    files, k, decode = rows.pictures, rows.picture[i], rgb_picture
    if k < 0:
        files, k, decode = rows.sounds, rows.sound[i], spectrum_picture
    try:
        return decode(files[k])
    except ValueError as e:
        raise ValueError(f'{files.names[k]}: {e}: remove or repair it') from None


def some_rows(rows, n):
    """At most n rows to look at, always the same ones, every type in turn."""
    by_type = {}
    for i in random.Random(0).sample(range(len(rows)), len(rows)):
        by_type.setdefault(rows.type[i], []).append(i)
    chosen = []
    while len(chosen) < min(n, len(rows)):
        chosen += [by_type[type].pop() for type in sorted(by_type, key=type_order) if by_type[type]]
    return chosen[:n]


def draw_samples(path, rows, predictions, n=24, image_px=192):
    """Writes a sheet of samples, every type in turn; right answers green, wrong ones red, captions black."""
    tiles = []
    colors = []
    for i in some_rows(rows, n):
        p = predictions[i]
        picture = picture_of(rows, i)
        how = Image.NEAREST if picture.width < image_px else Image.BICUBIC
        picture = picture.resize((image_px, image_px), how)
        true = ' / '.join(p['references'][:3])
        tiles.append((picture, [p['question'], f"says: {p['prediction']}", f'true: {true}']))
        if p['type'] == 'describe':
            colors.append('black')
        else:
            colors.append('darkgreen' if p['em'] else 'firebrick')
    sheet = picture_sheet(tiles, scale=1, colors=colors)
    write_whole(path, partial(sheet.save, format='PNG'))


def write_json(path, value, indent=None):
    def write(file):
        file.write(json.dumps(value, indent=indent).encode())

    write_whole(path, write)


def write_results(out_dir, metrics, rows, predictions):
    """predictions.jsonl, samples.png, curves.png and, where rows have ten answers, vqav2_results.json of a
    run folder; then metrics.json, which says that the run is finished. Until the pictures are tried, its
    content lies in metrics.unfinished.json."""
    out_dir = Path(out_dir)

    def write_predictions(file):
        file.writelines(json.dumps(p).encode() + b'\n' for p in predictions)

    write_whole(out_dir / 'predictions.jsonl', write_predictions)
    if all('vqa' in p and p['sample_id'].isdecimal() for p in predictions):  # the official form of VQA v2
        results = [dict(question_id=int(p['sample_id']), answer=p['prediction']) for p in predictions]
        write_json(out_dir / 'vqav2_results.json', results)
    # question by question, for paired comparisons
    correct = ''.join('-' if p['type'] == 'describe' else str(int(p['em'])) for p in predictions)
    write_json(out_dir / 'metrics.unfinished.json', metrics | dict(correct=correct), indent=1)
    with harmless(out_dir / 'samples.png'):
        draw_samples(out_dir / 'samples.png', rows, predictions)
    draw_curves(out_dir)
    if rank_and_world()[0] == 0:
        (out_dir / 'metrics.unfinished.json').replace(out_dir / 'metrics.json')


def already_finished(saved, settings):
    """Whether a run, as its checkpoint has it, has nothing left to do; its result is then shown."""
    file = Path(settings.out_dir) / 'metrics.json'
    if not saved or saved['run']['step'] < settings.max_steps or not file.is_file():
        return False
    result = json.loads(file.read_text())
    if result['step'] != saved['run']['step']:  # it ended before, and went on past that
        return False
    print(result_table(result))
    print(f'{settings.out_dir}: finished at step {settings.max_steps}, this is its result; to evaluate it '
          f'again: python eval.py --out_dir={settings.out_dir}; --fresh=true deletes it and trains anew')
    return True
