"""The pages on recursion say what results/runs says: their tables cell by cell, and every `mean ± half an interval` of their text is one that is computed here."""

import json
import re
from functools import cache
from glob import glob

import numpy as np
import pytest
from conftest import ROOT

from lab.compare import depth, plus_minus, spread, training_flops

README, HEADING = 'README.md', 'Does recursion help?'  # of the table there that is tested where it is present


@cache
def runs(name):
    """The finished runs of this name, by seed."""
    return {path.removesuffix('.json')[-1]: json.loads(open(path).read()) for path in sorted(glob(str(ROOT / f'results/runs/{name}_?.json')))}


def name_of(run, rate):
    return run + (f'_lr{rate}' if rate not in ('', '2e-3') else '')


def swaps(m, *counts):
    """Exact Match on the questions with so many swaps, the mean over the counts."""
    return np.mean([m['by_type'][f'{k} swap' + 's' * (k != 1)]['em'] for k in counts])


def reached(m, em):
    """The training step at which validation first had it, or None."""
    return next((step for step, _, best in m['curve'] if best >= em), None)


SCORES = {
    'Exact Match': lambda m: m['em'], 'mean of types': lambda m: m['em_types'], 'captions, F1': lambda m: m['by_type']['describe']['f1'],
    **{f'{kind}, %': lambda m, kind=kind: 100 * m['by_type'][kind]['em'] for kind in ('relational', 'non-relational')},
    **{f'0 to {k} swaps': lambda m, k=k: swaps(m, *range(k + 1)) for k in (3, 4, 5)}, **{f'{k} swaps': lambda m, k=k: swaps(m, k) for k in range(9)},
    **{f'TFLOP until {em}': lambda m, em=em: (reached(m, float(em)) or np.nan) / m['step'] * training_flops(m) / 1e12 for em in ('.70', '.78', '.99')}}


def cell(column, of, ms=0):
    """What a column of a table says of runs that differ in their seed; ms: of a training step, where the table has it."""
    several = list(of.values())
    m, score = several[0], SCORES.get(re.sub(', by seed|, \\d+ TFLOP', '', f'{column} swaps' if column.isdigit() else column))
    digits = 1 if '%' in column else 3
    if found := re.fullmatch(r'(seconds|TFLOP) until (\.\d+)', column):
        spent = np.array([score(m) if score else (reached(m, float(found.group(2))) or np.nan) * ms / 1e3 for m in several])
        there = spent[~np.isnan(spent)]
        return f'{there.mean():.{1 if score else 0}f}' + (f' ({len(there)} of {len(of)})' if len(there) < len(of) else '') if len(there) else 'never'
    if column.endswith('by seed'):
        return ' '.join(f'{score(m):.{digits}f}' for m in several)
    if re.fullmatch(r'\d|\d swaps|captions, F1', column):
        return f'{np.mean([score(m) for m in several]):.2f}'
    if score:
        mean, half = spread([score(m) for m in several])
        return f'{mean:.{digits}f}' + (f' ± {half:.{digits}f}' if half is not None else '')
    if column.startswith('minus'):
        return '-' if of is runs('trm') else plus_minus([m['em'] - runs('trm')[seed]['em'] for seed, m in of.items()], sign='+')
    if column.startswith('runs that follow'):
        return f"{sum(swaps(m, 4 if 'four' in column else 3) >= .95 for m in several)} of {len(of)}"
    return {'core parameters': f"{m['parameters']['core'] / 1e3:.0f} k", 'depth': f'{depth(m)}', 'training steps': f"{m['step']:,}", 'seeds': f'{len(of)}',
            'TFLOP': f'{training_flops(m) / 1e12:.1f}', 'ms a training step': f'{ms}', 'minutes in all': f"{m['step'] * ms / 6e4:.1f}"}[column]


def named(line):
    """Whether a line is a row of a table whose first cell has a name in back quotes."""
    return re.match(r'\| [^|]*`[\w-]+`', line)


def tables(page, heading=''):
    """The tables of a page, or under a heading of it, that have rows which name a run: each a list of these rows, {column: cell}. A column `by seed` is of the one before it."""
    text = (ROOT / page).read_text()
    if heading:
        text = ''.join(re.findall(rf'^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)', text, re.M | re.S))
    split = lambda line: [text.strip() for text in line.strip('|').split('|')]
    found = []
    for head, _, *lines in (table.splitlines() for table in re.findall(r'(?:^\|.*\n)+', text, re.M)):
        columns = split(head)
        columns = [f'{before}, by seed' if column == 'by seed' else column for before, column in zip([''] + columns, columns)]
        found.append([dict(zip(columns, split(line))) for line in lines if named(line)])
    return [rows for rows in found if rows]


# the page, which of its tables, how the runs are called whose names the rows shorten, their learning rate unless a row says another, and how many rows there are
TABLES = [('swaps', 0, 'swaps_{}', '1e-3', 11), ('seconds', 0, 'swaps_{}', '', 6), ('longer', 0, 'swaps4_{}', '', 5),
          ('flops', 0, 'flops_{}', '', 8), ('captions', 0, '{}', '', 8), ('sortofclevr', 0, 'sortofclevr_{}', '', 5), ('cycles', 0, 'swaps_{}', '', 4),
          ('ablations', 0, '{}', '', 11), ('encoder', 0, '{}', '', 9)]
RATES = [('rates', 0, 'swaps_{}', 8)]
BY_HAND = [('states', 0), ('states', 1), ('pretrained', 0)]  # of checkpoints, which are not in results/runs (but see test_as_trained); for pretrained see below


def check(rows, name, rate):
    """Every row has the numbers of the runs that it names."""
    for row in rows:
        first, *columns = row
        run, other_rate = re.search(r'`([\w-]+)`(?:, (\de-\d))?', row[first]).groups()
        shapes_rate = ''.join(re.findall(r'on shapes (\de-\d)', row[first]))
        of = runs(name_of(name.format(run), other_rate or rate).replace('sortofclevr_n2', 'sortofclevr'))
        for column in columns:
            score, these = column, of
            if column.startswith('shapes'):
                score, these = column.replace('shapes', 'Exact Match'), runs(name_of(f'flops_{run}', shapes_rate))
            elif column.startswith('Sort-of-CLEVR'):
                score, these = 'relational, %', runs(f'sortofclevr_{run}'.replace('_n2', ''))
            elif column == 'F1 at equal FLOPs':
                score, these = 'captions, F1', runs(name_of(f'flops_{run}', shapes_rate))
            elif column == 'F1 at equal steps':
                score, these = 'captions, F1', runs('trm' if run == 'n4' else run)
            elif column == 'depth' and not of:
                these = runs(f'flops_{run}')
            assert row[column] == (cell(score, these, int(row.get('ms a training step', 0))) if these else ''), (row[first], column)


@pytest.mark.parametrize('page, number, name, rate, n', TABLES)
def test_tables(page, number, name, rate, n):
    rows = tables(f'results/{page}.md')[number]
    assert len(rows) == n
    check(rows, name, rate)


def test_readme():
    """The table of the README, where there is one: swaps at 1e-3, shapes at 2e-3, unless a row says another rate."""
    found = tables(README, HEADING)
    if not found:
        pytest.skip(f'{README} has no table under {HEADING!r}')
    for rows in found:
        check(rows, 'swaps_{}', '1e-3')


@pytest.mark.parametrize('page', sorted(path.stem for path in (ROOT / 'results').glob('*.md')))
def test_no_table_left_out(page):
    """Every table whose first column names something in back quotes is tested above, or is one of the few that cannot be."""
    listed = sorted(number for name, number, *_ in [*TABLES, *RATES, *BY_HAND] if name == page)
    assert listed == list(range(len(tables(f'results/{page}.md'))))


def test_pretrained_decoders():
    """Every row, of SmolLM2 and of the TRM beside it, has the numbers of its run."""
    rows = tables('results/pretrained.md')[0]
    assert len(rows) == 5
    for row in rows:
        m = runs(re.search('`(.*)`', row['decoder'])[1])['1']
        scores = {name: of['em'] for name, of in m['by_type'].items()} | dict(all=m['em'])
        for column, type in (('all', 'all'), ('what is at', 'what'), ('compare', 'compare'), ('relation', 'relation')):
            assert row[column] == f'{scores[type]:.3f}'
        assert row["captions' F1"] == f"{m['by_type']['describe']['f1']:.2f}" and row['GFLOP a row'] == f"{m['mflop_per_example'] / 1000:.1f}"
        assert row['steps x rows'] == f"{m['settings']['max_steps']:,} x {m['settings']['batch_size']}" and row['minutes'] == f"{m['train_s'] / 60:.0f}"


def test_sounds():
    """The table of pictures and sounds, the two controls beside it: means over the seeds."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in (ROOT / 'results/sounds.md').read_text().splitlines() if line.startswith('|')][2:]
    three = [runs(name).values() for name in ('sounds', 'sounds_blind', 'sounds_deaf')]
    assert {type for _, type, *_ in rows} == {*next(iter(three[0]))['by_type'], 'all'} and all(len(of) == 3 for of in three)
    for _, type, *said in rows:
        assert said == [f"{np.mean([(m['by_type'] | dict(all=m))[type]['em'] for m in of]):.3f}" for of in three], type


def best_of(name, rates):
    """The best validation of seed 1 by learning rate, where there is a run."""
    of = {rate: runs(name_of(name, rate)).get('1') for rate in rates}
    return {rate: max(best for _, _, best in m['curve']) for rate, m in of.items() if m}


@pytest.mark.parametrize('page, number, name, n', RATES)
def test_rates(page, number, name, n):
    """So has the table of learning rates: the best validation of seed 1; what is not in it is below that, but for what the text names."""
    rows = tables(f'results/{page}.md')[number]
    assert len(rows) == n
    text, better = (ROOT / f'results/{page}.md').read_text(), []
    for row in rows:
        decoder = row.pop('decoder').strip('`')
        best = best_of(name.format(decoder), ('5e-4', '1e-3', '2e-3', '4e-3'))
        assert row == {rate: f'{best[rate]:.3f}' for rate in ('1e-3', '2e-3')}, decoder
        if (rate := max(best, key=best.get)) not in row:
            better.append(f'`{decoder}` ({rate} {best[rate]:.3f})'.replace(' 0.', ' .'))
    assert ' and '.join(better) in text and better


@pytest.mark.parametrize('decoder', 'n1 n2 n4 loop2 loop4 plain2 plain4 plain8'.split())
def test_rates_on_shapes(decoder):
    """Validation of seed 1 prefers 2e-3 there, but 4e-3 for four and eight plain blocks, as results/rates.md says in a sentence."""
    best = best_of(f'flops_{decoder}', ('1e-3', '2e-3', '4e-3', '8e-3'))
    large = decoder in ('plain4', 'plain8')
    assert max(best, key=best.get) == ('4e-3' if large else '2e-3') and len(best) == 3 + large


def test_as_trained():
    """What results/states.md says of its runs as they were trained is what their files have."""
    passes, states = tables('results/states.md')
    for row in passes:
        decoder, rate, seed = re.fullmatch(r'`(\w+)`, (\de-\d), seed (\d)', row['decoder']).groups()
        assert row['as trained'] == f"{swaps(runs(name_of(f'swaps_{decoder}', rate))[seed], 3):.2f}"
    for row in states:
        run, seeds = re.fullmatch(r'`([\w-]+)`, seeds? (\d(?:, \d)*)', row['run']).groups()
        scores = {'one swap': lambda m: swaps(m, 1), 'three swaps': lambda m: swaps(m, 3), 'four swaps': lambda m: swaps(m, 4), 'shapes': SCORES['Exact Match'], 'captions, F1': SCORES['captions, F1']}
        said = row['as trained'].split()
        assert said == [f"{scores[row['measured on']](runs(run)[seed]):.{len(text.split('.')[1])}f}" for seed, text in zip(seeds.split(', '), said, strict=True)]


# the intervals in the text: a score, what the names of its runs begin with, and the runs: one, a difference of two, or a difference of two differences;
# a number at the end: of the first so many seeds alone
INTERVALS = [
    ('0 to 3 swaps', 'swaps_', 'n4_lr1e-3 n1_lr1e-3, n4_lr1e-3 n2_lr1e-3, n4_lr1e-3 plain2_lr1e-3, n4_lr1e-3 plain4_lr1e-3, n4_lr1e-3 plain4, loop2_lr1e-3 plain4, n2_lr1e-3 plain4'),
    ('0 to 3 swaps', 'swaps_', 'n2_lr1e-3 loop2_lr1e-3, own4_lr1e-3 n1_lr1e-3, own4_lr1e-3 plain4_lr1e-3, own4_lr1e-3 loop4_lr1e-3, own4 loop4'),
    ('0 to 3 swaps', 'swaps_', 'n4_lr1e-3 plain8_clock, n4_lr1e-3 plain4_clock, n4_lr1e-3 plain4_2360, n4_lr1e-3 plain4_3000, T2_lr1e-3 n4_lr1e-3, T2_deep_lr1e-3 n4_lr1e-3, T2_lr1e-3 n2_lr1e-3, T2_deep_lr1e-3 n2_lr1e-3'),
    ('0 to 3 swaps', 'swaps_', 'n4 n1, n4 plain2, n4 plain4, n4 loop4'),
    ('3 swaps', 'swaps_', 'n4_lr1e-3 n1_lr1e-3, n4_lr1e-3 n2_lr1e-3, n4_lr1e-3 plain2_lr1e-3, n4_lr1e-3 plain4, n4_lr1e-3 T2_lr1e-3, n4_lr1e-3 T2_deep_lr1e-3'),
    ('4 swaps', 'swaps_', 'n8_lr1e-3'), ('TFLOP until .99', 'swaps_', 'n4_lr1e-3 n8_lr1e-3'), ('TFLOP until .70', 'swaps_', 'n1_lr1e-3 n4_lr1e-3, plain2_lr1e-3 n4_lr1e-3'),
    ('TFLOP until .78', 'swaps_', 'n1_lr1e-3 n4_lr1e-3, plain2_lr1e-3 n4_lr1e-3, plain4 n4_lr1e-3, n8_lr1e-3 loop8_lr1e-3'),
    ('0 to 4 swaps', 'swaps4_', 'n8 n4, n4 loop4, n4 plain4, loop4 plain4, n8 plain4, loop8 plain4, loop8 n8, loop8 loop4'),
    ('Exact Match', 'flops_', 'n1 plain2, n2 n1, n4 n1, n2 plain4, n2 plain4_lr4e-3, plain2 plain4, plain2 plain4_lr4e-3, plain2 plain8_lr4e-3, loop4 plain8, loop4 plain8_lr4e-3, n4 plain2, loop4 plain2, loop2 plain2, n2 loop2, n2 loop4'),
    ('captions, F1', '', 'elastic_loop main, elastic main, elastic_loop elastic'), ('Exact Match', '', 'elastic_loop main, elastic_loop elastic, elastic main, mosaics_elastic mosaics, mosaics_plain4 mosaics, mosaics_along mosaics_frozen, daquar daquar_blind, trm, plain4, n8 n1, trm n1, plain4 plain2, plain8 plain2, loop2 n2, T3 trm, T2_deep T2, T3_deep T3, c64 trm, plain4_c64 plain4, plain4_c64 plain4 c64 trm'),
    ('Exact Match', 'encoder_', 'contrast both'), ('captions, F1', 'flops_', 'n4 plain2, plain4_lr4e-3 plain2, loop4 loop2, n4 n1'), ('captions, F1', '', 'trm n1, loop4 loop2, plain8 plain2, plain8 plain4, plain4_c192 trm, plain4 plain2, loop2 plain2, n6 trm, n8 trm'),
    ('relational, %', 'sortofclevr_', 'n4 plain2, n4 plain2 3, n4 loop4, n4 loop4 3, loop4 plain2 3'), ('relational, %', 'sortofclevr', ' _plain2, _encoder , _two, _elastic _two, _elastic_loop _two')]


def test_intervals():
    """Every interval in the text is one of those, and every one of those is in the text; the rows of tables that name runs are tested above."""
    texts = [path.read_text() for path in sorted((ROOT / 'results').glob('*.md'))]
    if f'# {HEADING}\n' in (readme := (ROOT / README).read_text()):
        texts.append(readme)
    text = '\n'.join(line for text in texts for line in text.splitlines() if not named(line))
    quoted, made = {(sign + a.lstrip('0'), b.lstrip('0')) for sign, a, b in re.findall(r'([+-]?)(\d*\.\d+) ± (\d*\.\d+)', text)}, set()
    for score, start, lists in INTERVALS:
        for words in (one.split(' ') for one in lists.replace(', ', ',').split(',')):
            first = int(words.pop()) if words[-1].isdigit() else 9
            several = [runs(start + word) for word in words]
            seeds = sorted(set.intersection(*map(set, several)))[:first]
            values = [sum(sign * SCORES[score](of[seed]) for sign, of in zip((1, -1, -1, 1), several)) for seed in seeds]
            interval = spread([value for value in values if not np.isnan(value)])
            forms = set()
            for digits in (1,) if '%' in score or 'TFLOP' in score else (2, 3):
                mean, half = (f'{abs(x):.{digits}f}'.lstrip('0') for x in interval)
                forms |= {(mean, half), ('-+'[bool(interval[0] >= 0)] + mean, half)}
            assert forms & quoted, f'{score}, {start} {words}: {interval} is on no page'
            made |= forms
    assert quoted <= made, quoted - made


@pytest.mark.parametrize('said, names', [('18 of 18', 'n4_lr1e-3 n8_lr1e-3 loop4_lr1e-3 loop8_lr1e-3'), ('3 of 8', 'n2_lr1e-3 loop2_lr1e-3'), ('0 of 18', 'n1_lr1e-3 plain2_lr1e-3 plain4_lr1e-3 plain8_lr1e-3')])
def test_counts(said, names):
    """So many runs follow three swaps, as the page on swaps says."""
    of = [swaps(m, 3) >= .95 for name in names.split() for m in runs(f'swaps_{name}').values()]
    assert said == f'{sum(of)} of {len(of)}' and said in (ROOT / 'results/swaps.md').read_text()


def test_sentences():
    """So do sentences that say what a table once did."""
    said = lambda page, sentence: sentence in (ROOT / f'results/{page}.md').read_text()
    four, eight = (cell('0 to 5 swaps', runs(f'swaps5_{run}')) for run in ('n4', 'n8'))
    assert said('longer', f'0 to 5 swaps have {four} with four passes, {eight} with eight')
    steps = [cell('training steps', runs(f'flops_{run}')) for run in ('plain2', 'plain4', 'plain8')]
    assert said('flops', 'two have {}, four {}, eight {}.'.format(*steps))
    recursive, plain = (sorted(cell('TFLOP', runs(f'flops_{run}')) for run in names.split()) for names in ('n1 n2 n4 loop2 loop4', 'plain2 plain4 plain8'))
    assert said('flops', f'Recursive decoders got {recursive[0]} to {recursive[-1]} TFLOP, plain ones {plain[0]} or {plain[-1]}.')
    both = {run: best_of(f'swaps_{run}', ('5e-4', '1e-3', '2e-3', '4e-3')) for run in ('n4', 'loop4', 'loop8')}
    assert said('rates', f"`n4`, `loop4` and `loop8` have {min(best[rate] for best in both.values() for rate in ('1e-3', '2e-3')):.3f} or more at both".replace(' 0.', ' .'))
    assert all(max(best, key=best.get) in ('1e-3', '2e-3') for best in both.values())
    assert said('seconds', f"at equal steps ({float(cell('TFLOP', runs('swaps_plain4_3000'))):.0f} TFLOP)")
    frozen = [runs(name)[seed] for name in ('sortofclevr', 'sortofclevr_n4', 'sortofclevr_loop4', 'sortofclevr_plain2') for seed in runs(name)]
    assert said('sortofclevr', f"{np.mean([SCORES['non-relational, %'](m) for m in frozen]):.0f} % of the non-relational questions")
