"""The pages on recursion say what results/runs says: their tables cell by cell, and every `mean ± half an interval` of their text is one that is computed here."""

import json
import re
from functools import cache
from glob import glob

import numpy as np
import pytest
from conftest import ROOT

import eval as evaluation

README, RESULTS, DETAILS, HYPOTHESES = 'README.md', 'results/README.md', 'results/details.md', 'results/hypotheses.md'


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
    **{f'TFLOP until {em}': lambda m, em=em: (reached(m, float(em)) or np.nan) / m['step'] * evaluation.training_flops(m) / 1e12 for em in ('.70', '.78', '.99')}}


def cell(column, of, ms=0):
    """What a column of a table says of runs that differ in their seed; ms: of a training step, where the table has it."""
    several = list(of.values())
    m, score = several[0], SCORES.get(re.sub(', by seed|, \\d+ TFLOP', '', f'{column} swaps' if column.isdigit() else column))
    digits = 1 if '%' in column else 3
    if found := re.fullmatch(r'(seconds|TFLOP) until (\.\d+)', column):
        spent = np.array([score(m) if score else (reached(m, float(found.group(2))) or np.nan) * ms / 1e3 for m in several])
        there = spent[~np.isnan(spent)]
        return f'{there.mean():.{1 if score else 0}f}' + (f' ({len(there)} of {len(of)})' if len(there) < len(of) else '') if len(there) else 'never'
    if column.startswith('training step at'):
        steps = [reached(m, float(column.split()[-1])) or 'never' for m in several]
        return 'never' if set(steps) == {'never'} else ', '.join(map(str, steps))
    if column.endswith('by seed'):
        return ' '.join(f'{score(m):.{digits}f}' for m in several)
    if re.fullmatch(r'\d|\d swaps|captions, F1', column):
        return f'{np.mean([score(m) for m in several]):.2f}'
    if score:
        mean, half = evaluation.spread([score(m) for m in several])
        return f'{mean:.{digits}f}' + (f' ± {half:.{digits}f}' if half is not None else '')
    if column.startswith('minus'):
        return '-' if of is runs('trm') else evaluation.plus_minus([m['em'] - runs('trm')[seed]['em'] for seed, m in of.items()], sign='+')
    if column.startswith('runs that follow'):
        return f"{sum(swaps(m, 4 if 'four' in column else 3) >= .95 for m in several)} of {len(of)}"
    return {'core parameters': f"{m['parameters']['core'] / 1e3:.0f} k", 'depth': f'{evaluation.depth(m)}', 'training steps': f"{m['step']:,}", 'seeds': f'{len(of)}',
            'TFLOP': f'{evaluation.training_flops(m) / 1e12:.1f}', 'ms a training step': f'{ms}', 'minutes in all': f"{m['step'] * ms / 6e4:.1f}"}[column]


def tables(page, heading):
    """The tables under a heading, each a list of rows {column: cell}; rows that name no run in back quotes are left out. A column `by seed` is of the one before it."""
    section = re.search(rf'^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)', (ROOT / page).read_text(), re.M | re.S).group(1)
    split = lambda line: [text.strip() for text in line.strip('|').split('|')]
    for head, _, *lines in (table.splitlines() for table in re.findall(r'(?:^\|.*\n)+', section, re.M)):
        columns = split(head)
        columns = [f'{before}, by seed' if column == 'by seed' else column for before, column in zip([''] + columns, columns)]
        yield [dict(zip(columns, split(line))) for line in lines if re.search(r'`[\w-]+`', line)]


@pytest.mark.parametrize('page, heading, number, name, rate, n', [
    (README, 'Results', 1, 'swaps_{}', '1e-3', 9), (README, 'Results', 3, 'sortofclevr_{}', '', 4),
    (RESULTS, 'Swaps: where depth is the difficulty', 0, 'swaps_{}', '1e-3', 13), (RESULTS, 'Swaps: where depth is the difficulty', 1, 'swaps_{}', '1e-3', 13),
    (RESULTS, 'Up to four swaps', 0, 'swaps4_{}', '', 5), (RESULTS, 'Shapes: where it is not', 0, 'flops_{}', '', 10), (RESULTS, 'Sort-of-CLEVR, a task of others', 0, 'sortofclevr_{}', '', 4),
    (DETAILS, 'Swaps by seed and learning rate', 0, 'swaps_{}', '', 22), (DETAILS, 'Equal steps, equal seconds, cycles', 0, '{}', '', 12),
    (DETAILS, 'Up to five swaps in training', 0, 'swaps5_{}', '', 2), (DETAILS, 'One thing changed at a time', 0, '{}', '', 31)])
def test_tables(page, heading, number, name, rate, n):
    """Every row of the page's table under a heading has the numbers of the runs that it names, at this learning rate unless it says another."""
    rows = list(tables(page, heading))[number]
    assert len(rows) == n
    for row in rows:
        first, *columns = row
        run, other_rate = re.search(r'`([\w-]+)`(?:, (\de-\d))?', row[first]).groups()
        shapes_rate = ''.join(re.findall(r'on shapes (\de-\d)', row[first]))
        of = runs(name_of(name.format(run), other_rate or row.get('rate', rate)).replace('sortofclevr_n2', 'sortofclevr'))
        for column in columns:
            these = runs(name_of(f'flops_{run}', shapes_rate)) if column.startswith('shapes') else of
            made = row[column] if column == 'rate' else cell(column.replace('shapes', 'Exact Match'), these, int(row.get('ms a training step', 0))) if these else ''
            assert row[column] == made, (row[first], column)


@pytest.mark.parametrize('number, name, score, digits, n', [(1, 'swaps_{}', '3 swaps', 2, 11), (2, 'flops_{}', 'Exact Match', 3, 8)])
def test_rates(number, name, score, digits, n):
    """So have the tables of learning rates: the best validation of seed 1 and, in brackets, its test score; a cell is empty where there is no run."""
    rows = list(tables(DETAILS, 'Swaps by seed and learning rate'))[number]
    assert len(rows) == n
    for row in rows:
        decoder = row.pop('decoder').strip('`')
        for rate, said in row.items():
            m = runs(name_of(name.format(decoder), rate)).get('1')
            assert said == (f"{max(best for _, _, best in m['curve']):.3f} ({SCORES[score](m):.{digits}f})" if m else ''), (decoder, rate)


# the intervals in the text: a score, what the names of its runs begin with, and the runs: one, a difference of two, or a difference of two differences;
# a number at the end: of the first so many seeds alone
INTERVALS = [
    ('0 to 3 swaps', 'swaps_', 'n4_lr1e-3 n1_lr1e-3, n4_lr1e-3 n2_lr1e-3, n4_lr1e-3 plain2_lr1e-3, n4_lr1e-3 plain4_lr1e-3, n4_lr1e-3 plain4, loop2_lr1e-3 plain4, n2_lr1e-3 plain4'),
    ('0 to 3 swaps', 'swaps_', 'n2_lr1e-3 loop2_lr1e-3, own4_lr1e-3 n1_lr1e-3, own4_lr1e-3 plain2_lr1e-3, own4_lr1e-3 plain4, own4_lr1e-3 plain4_lr1e-3, own4_lr1e-3 loop4_lr1e-3, own4 loop4'),
    ('0 to 3 swaps', 'swaps_', 'n4_lr1e-3 plain8_clock, n4_lr1e-3 plain4_clock, n4_lr1e-3 plain4_2360, n4_lr1e-3 plain4_3000, T2_lr1e-3 n4_lr1e-3, T2_deep_lr1e-3 n4_lr1e-3, T2_lr1e-3 n2_lr1e-3, T2_deep_lr1e-3 n2_lr1e-3'),
    ('0 to 3 swaps', 'swaps_', 'n4 n1, n4 n1 3, n4 plain2, n4 plain2 3, n4 plain4, n4 plain4 3, n4 loop4, n4 loop4 3'),
    ('3 swaps', 'swaps_', 'n4_lr1e-3 n1_lr1e-3, n4_lr1e-3 n2_lr1e-3, n4_lr1e-3 plain2_lr1e-3, n4_lr1e-3 plain4, n4_lr1e-3 T2_lr1e-3, n4_lr1e-3 T2_deep_lr1e-3'),
    ('4 swaps', 'swaps_', 'n8_lr1e-3'), ('TFLOP until .99', 'swaps_', 'n4_lr1e-3 n8_lr1e-3'), ('TFLOP until .70', 'swaps_', 'n1_lr1e-3 n4_lr1e-3, plain2_lr1e-3 n4_lr1e-3'),
    ('TFLOP until .78', 'swaps_', 'n1_lr1e-3 n4_lr1e-3, plain2_lr1e-3 n4_lr1e-3, plain4 n4_lr1e-3, n8_lr1e-3 loop8_lr1e-3'),
    ('0 to 4 swaps', 'swaps4_', 'n8 n4, n4 loop4, n4 plain4, loop4 plain4, n8 plain4, loop8 plain4, loop8 n8, loop8 loop4'),
    ('Exact Match', 'flops_', 'n1 plain2, n2 n1, n4 n1, n2 plain4, n2 plain4_lr4e-3, plain2 plain4, plain2 plain4_lr4e-3, plain2 plain8_lr4e-3, loop4 plain8, loop4 plain8_lr4e-3, n4 plain2, loop4 plain2, loop2 plain2, n2 loop2, n2 loop4'),
    ('Exact Match', '', 'trm, plain4, n8 n1, trm n1, plain4 plain2, plain8 plain2, loop2 n2, T3 trm, T2_deep T2, T3_deep T3, c64 trm, plain4_c64 plain4, plain4_c64 plain4 c64 trm'),
    ('Exact Match', 'encoder_', 'contrast both'), ('captions, F1', 'flops_', 'n4 plain2, plain4_lr4e-3 plain2, loop4 loop2, n4 n1'), ('captions, F1', '', 'trm n1, loop4 loop2, plain8 plain2, plain8 plain4, plain4_c192 trm, plain4 plain2, loop2 plain2, n6 trm, n8 trm'),
    ('relational, %', 'sortofclevr_', 'n4, loop4, plain2, n4 plain2, n4 plain2 3, n4 loop4, n4 loop4 3, loop4 plain2 3'), ('relational, %', 'sortofclevr', ' _plain2, _encoder ')]


def test_intervals():
    """Every interval in the text is one of those, and every one of those is in the text; the tables are tested above."""
    text = '\n'.join(line for page in (README, RESULTS, DETAILS, HYPOTHESES) for line in (ROOT / page).read_text().splitlines() if page == HYPOTHESES or not line.startswith('|'))
    quoted, made = {(sign + a.lstrip('0'), b.lstrip('0')) for sign, a, b in re.findall(r'([+-]?)(\d*\.\d+) ± (\d*\.\d+)', text)}, set()
    for score, start, lists in INTERVALS:
        for words in (one.split(' ') for one in lists.replace(', ', ',').split(',')):
            first = int(words.pop()) if words[-1].isdigit() else 9
            several = [runs(start + word) for word in words]
            seeds = sorted(set.intersection(*map(set, several)))[:first]
            values = [sum(sign * SCORES[score](of[seed]) for sign, of in zip((1, -1, -1, 1), several)) for seed in seeds]
            spread = evaluation.spread([value for value in values if not np.isnan(value)])
            forms = set()
            for digits in (1,) if '%' in score or 'TFLOP' in score else (2, 3):
                mean, half = (f'{abs(x):.{digits}f}'.lstrip('0') for x in spread)
                forms |= {(mean, half), ('-+'[bool(spread[0] >= 0)] + mean, half)}
            assert forms & quoted, f'{score}, {start} {words}: {spread} is on no page'
            made |= forms
    assert quoted <= made


@pytest.mark.parametrize('said, names', [('18 of 18', 'n4_lr1e-3 n8_lr1e-3 loop4_lr1e-3 loop8_lr1e-3'), ('3 of 8', 'n2_lr1e-3 loop2_lr1e-3'), ('0 of 18', 'n1_lr1e-3 plain2_lr1e-3 plain4_lr1e-3 plain8_lr1e-3')])
def test_counts(said, names):
    """So many runs follow three swaps, as the README and the results say."""
    of = [swaps(m, 3) >= .95 for name in names.split() for m in runs(f'swaps_{name}').values()]
    assert said == f'{sum(of)} of {len(of)}' and all(f'by {said}' in (ROOT / page).read_text() for page in (README, RESULTS))
