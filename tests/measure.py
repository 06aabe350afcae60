"""What can be measured about the pages: python tests/measure.py [FOLDER]."""

import ast
import io
import sys
import tokenize
from pathlib import Path
from statistics import median

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)
PAGES = ['model.py', 'train.py', 'data.py', 'encoder.py']
ON_THE_WAY = [f'plumbing/{name}.py' for name in
              ('tables', 'pictures', 'features', 'ranks', 'run', 'machine', 'console', 'files')]
SKIPPED = ('tests', 'out', 'data', 'config')
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def tokens_a_line(text):
    """Tokens of every line of code; comments do not count, a string is one."""
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT | {tokenize.COMMENT}:
            lines[token.start[0]] = lines.get(token.start[0], 0) + 1
    return list(lines.values())


def functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.end_lineno - node.lineno + 1, node.name


def lambdas(tree):
    """Lambdas that are no sort keys."""
    keys = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == 'key'}
    return sum(isinstance(node, ast.Lambda) and id(node) not in keys for node in ast.walk(tree))


def tuple_assignments(tree):
    return sum(isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
               and isinstance(node.value, ast.Tuple) for node in ast.walk(tree))


def circles(files):
    """Files that import each other, by whatever way round."""
    names = {'.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): p for p in files}
    graph = {}
    for name, path in names.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                wanted.add(node.module)
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        graph[name] = (wanted & names.keys()) - {name}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs.difference_update(leaves)
    return len(graph)


def show(title, paths):
    texts = {path: path.read_text() for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = [line for text in texts.values() for line in text.splitlines()]
    n_comments = sum(line.lstrip().startswith('#') or '  # ' in line for line in lines)
    longest = max((size, f'{path.name}:{name}') for path, tree in trees.items() for size, name in functions(tree))
    print(f'{title} | {len(lines)} lines | {n_comments / len(lines):.0%} with a comment '
          f'| {median(n for text in texts.values() for n in tokens_a_line(text)):.0f} tokens a code line (median) '
          f'| widest {max(map(len, lines))} | over 110: {sum(len(line) > 110 for line in lines)} '
          f'| longest function {longest[0]} ({longest[1]}) | lambdas {sum(map(lambdas, trees.values()))} '
          f'| tuple assignments {sum(map(tuple_assignments, trees.values()))}')


if __name__ == '__main__':
    everything = [p for p in sorted(ROOT.rglob('*.py')) if p.relative_to(ROOT).parts[0] not in SKIPPED]
    for page in PAGES:
        show(page, [ROOT / page])
    show('the four pages', [ROOT / page for page in PAGES])
    if (ROOT / 'plumbing').is_dir():
        show('plumbing on the way of a batch', [ROOT / page for page in ON_THE_WAY])
    show('all files', everything)
    print(f"README {len((ROOT / 'README.md').read_text().split())} words "
          f"| results {sum(len(p.read_text().split()) for p in ROOT.glob('results/*.md'))} words "
          f'| files in import circles {circles(everything)}')
