"""
NLVR 1: is a sentence true of three boxes of shapes? CC-BY 4.0, https://github.com/lil-lab/nlvr, folder nlvr.

Every example has six pictures, the boxes in six orders. Its dev split is val, its test split test. Pictures
are 400 x 100: take --fit=squash or pad.
"""

from pathlib import Path

from prepare import published, read_json_lines


def rows(config):
    """Yields (split, row) for every picture of every example; the answer is true or false."""
    for part, split in (('train', 'train'), ('dev', 'val'), ('test', 'test')):
        path = Path(config.source) / part / f'{part}.json'  # JSON lines, whatever its name says
        images = Path(config.images or config.source) / part / 'images'

        def six(example):
            for k in range(6):
                name = f"{part}-{example['identifier']}-{k}"
                yield split, dict(
                    image=images / example['directory'] / f'{name}.png',
                    question=example['sentence'],
                    answer=str(example['label']).lower(),
                    sample_id=name,
                )

        yield from published(path, read_json_lines(path), six)
