"""
Names of the Hugging Face hub: `openai/clip-vit-large-patch14-336`, or with `@REVISION` behind it. A local
folder of that name comes first, then what lies in the hub's local cache, then the hub.

huggingface_hub does it, and is optional: pip install huggingface_hub. Only JSON files and safetensors are
fetched, or weights in another form where there are no safetensors; nothing in them is run.
"""

import re
from pathlib import Path

from pretrained.files import STEMS, weight_files

# weights of a repository that are read here: in its top folder, whole or in pieces
SAFE, OTHERS = (rf'({"|".join(STEMS)})(-\d+-of-\d+)?\.{ending}' for ending in ('safetensors', 'bin'))


def is_hub_name(name):
    """Whether it could be one: OWNER/NAME, perhaps with @REVISION, and nothing of that name is here."""
    return re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', name) is not None and not Path(name).exists()


def folder_of(name, beside=()):
    """The local folder with the files of a repository -> (its path, its name with its revision, a commit).

    beside: files of which the cache has to have one, beside the weights.
    Raises: ValueError where there is no such repository, or no weights in it; or it is not in the cache and
        the hub cannot be reached.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f'{name}: to read it from the hub or its cache, pip install huggingface_hub; or '
                         'give a local folder') from None
    repository, _, revision = name.partition('@')
    asked = dict(repo_id=repository, revision=revision or None)
    try:
        folder = Path(huggingface_hub.snapshot_download(**asked, local_files_only=True))
        if is_whole(folder) and (not beside or any((folder / file).is_file() for file in beside)):
            return folder, f'{repository}@{folder.name}'
    except (OSError, ValueError):
        pass  # nothing of it is in the cache
    try:
        known = huggingface_hub.HfApi().model_info(**asked, files_metadata=True)
    except Exception as e:  # the library's, or those of the connection below it
        raise out_of_reach(name, e) from None
    sizes = {file.rfilename: file.size or 0 for file in known.siblings}
    wanted = files_to_fetch(name, sizes)
    megabytes = sum(sizes[file] for file in wanted) / 1e6
    print(f'{name}: fetching {len(wanted)} files, {megabytes:,.1f} MB, revision {known.sha}, from the hub')
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=known.sha, allow_patterns=wanted)
    except Exception as e:
        raise out_of_reach(name, e) from None
    return Path(folder), f'{repository}@{known.sha}'


def out_of_reach(name, e):
    """What to raise where the hub does not give a repository."""
    from huggingface_hub.constants import HF_HUB_CACHE
    lines = str(e).strip().splitlines() or [type(e).__name__]
    return ValueError(f'{name}: no file or folder of this name is here, none in the cache of the hub '
                      f'({HF_HUB_CACHE}), and the hub does not give it: {lines[0]}')


def files_to_fetch(name, files):
    """Those of a repository that are read here, all in its top folder. Raises: ValueError."""
    for kind in (SAFE, OTHERS):
        weights = [file for file in files if re.fullmatch(kind, file)]
        if weights:
            break
    else:
        some = ', '.join(sorted(files)[:8]) or 'none'
        raise ValueError(f'{name}: no weights that are read here: expected {STEMS[0]}.safetensors or .bin; '
                         f'it has {some}')
    beside = [file for file in files if file.endswith('.json') and '/' not in file]
    whole = [file for file in weights if Path(file).stem in STEMS]
    if whole:  # a copy in pieces may lie beside, whose list would ask for them
        weights = whole[:1]
        beside = [file for file in beside if not file.endswith('.index.json')]
    return sorted({*weights, *beside})


def is_whole(folder):
    """Whether a folder of the cache has all weights: it may hold a config that something else wanted."""
    try:
        return all(file.is_file() for file in weight_files(folder))
    except ValueError:
        return False
