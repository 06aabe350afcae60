"""
What can be had without looking: the commonest answer of the training split.

    python -m lab.guess --dataset=data/shapes                         # the same answer to everything
    python -m lab.guess --dataset=data/shapes --question_only=true    # the commonest to the same question
"""

import sys
from collections import Counter
from dataclasses import dataclass

from configurator import configure
from eval import rows_to_judge, scored, summaries
from plumbing.console import run_script
from plumbing.results import result_table
from plumbing.run import read_checkpoint


@dataclass
class GuessConfig:
    out_dir: str = 'out/trm'     # a run, whose dataset is taken where none is given
    dataset: str | None = None   # a dataset folder; it needs no run
    split: str = 'test'          # the split that is guessed: train, val or test
    question_only: bool = False  # the commonest answer to the same question; false: the commonest of all

    def __post_init__(self):
        if self.split not in ('train', 'val', 'test'):
            raise ValueError(f'split={self.split}: expected train, val or test')


def first_words(question):
    return ' '.join(question.lower().split()[:2])


def baseline(train, rows, question_only):
    """The commonest answer of the training split, or with `question_only` the commonest to the same question,
    else to those that begin with the same two words. -> metrics, as `eval.evaluate`"""
    to_all = Counter()
    to_question = {}
    to_beginning = {}
    for question, references in zip(train.question, train.references):
        answer = references[0]
        to_all[answer] += 1
        to_question.setdefault(question.lower(), Counter())[answer] += 1
        to_beginning.setdefault(first_words(question), Counter())[answer] += 1
    predictions = []
    for i, question in enumerate(rows.question):
        counts = to_all
        if question_only:
            counts = to_question.get(question.lower()) or to_beginning.get(first_words(question)) or to_all
        predictions.append(scored(rows, i, counts.most_common(1)[0][0]))
    return summaries(predictions)


def main(argv=None):
    s, _ = configure(GuessConfig, sys.argv[1:] if argv is None else argv, '-m lab.guess')
    dataset = s.dataset or read_checkpoint(s.out_dir)['settings']['dataset']
    train = rows_to_judge(dataset, 'train')
    rows = rows_to_judge(dataset, s.split)
    print(result_table(baseline(train, rows, s.question_only)))


if __name__ == '__main__':
    run_script(main)
