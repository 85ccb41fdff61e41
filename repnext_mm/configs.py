"""Where the configs are: in a checkout, or in the installed package as mm's tools look for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PACKAGED = Path(__file__).resolve().parent / '.mim' / 'configs'
#: The folder of this package's configs.
FOLDER = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parents[2] / 'configs'


#: Folders of configs, from the one of all configs on.
PLACES = ('.', 'imagenet', 'imagenet/ablation')


def config_paths(folder: Path = FOLDER) -> dict[str, Path]:
    """Every config by its name, which is that of its file without `.py`."""
    paths = [path for place in PLACES for path in sorted((folder / place).glob('*.py'))]
    named = {path.stem: path for path in paths}
    return {name: named[name] for name in sorted(named)}


def config_names() -> list[str]:
    """The names of this package's configs, without `.py`."""
    return list(config_paths())


def look_up(name: str) -> Path | None:
    """The config file that `name` means, with or without `.py`, or None.

    The first that exists of: the path itself, `configs/` of the current folder, this package's.
    """
    return next((path for path in _candidates(name) if path.is_file()), None)


def is_config_name(name: str) -> bool:
    """Whether `name` means a Python config, be it there or not."""
    return name.endswith('.py') or look_up(f'{name}.py') is not None


def _candidates(name: str) -> Iterator[Path]:
    # A name may have `configs/` before it where there is no such folder.
    folders = [Path(), *(base / place for base in (Path('configs'), FOLDER) for place in PLACES)]
    for folder in (*folders, FOLDER.parent):
        yield folder / name
        if not name.endswith('.py'):
            yield folder / f'{name}.py'
