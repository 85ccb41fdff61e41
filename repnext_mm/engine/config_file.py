"""Reading a config as the command line asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..configs import config_names, look_up
from ..text import closest
from .errors import UserError

SPLITS = ('train', 'val', 'test')
#: Settings of a loader that say something about its workers.
WITH_WORKERS = ('persistent_workers', 'prefetch_factor', 'timeout', 'multiprocessing_context')


def load_config(name: str, options: dict[str, Any], work_dir: str | None, launcher: str) -> Config:
    """The config that `name` means (see `look_up`) with `options` merged into it.

    An option `data_root` moves every data set and evaluator under the config's own
    `data_root`; in plain MMEngine it would change a variable that nothing reads any more.

    Raises:
        UserError: There is no such config, or it is not a config of a model.
    """
    path = find_config(name)
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        raise UserError(f'{path} imports what is not installed: {error}') from error
    except (SyntaxError, KeyError, OSError, TypeError) as error:
        raise UserError(f'{path} is not a valid config: {error}') from error
    root = cfg.get('data_root')
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        given = ' '.join(f'{key}={value!r}' for key, value in options.items())
        raise UserError(
            f'--cfg-options {given} does not fit {path}: {" ".join(str(error).split())[:300]}'
        ) from error
    if root and cfg.data_root != root:
        for key in (f'{split}_{part}' for split in SPLITS for part in ('dataloader', 'evaluator')):
            if cfg.get(key) is not None:
                cfg[key] = _moved(cfg[key], root, str(cfg.data_root))
    if cfg.get('model') is None:
        raise UserError(f'{path} has no model; give one that `repnext-mm models` lists.')
    neck = cfg.model.get('neck')
    if isinstance(neck, dict) and isinstance(neck.get('in_channels'), tuple):
        neck['in_channels'] = list(
            neck['in_channels']
        )  # a backbone's own out_channels; FPN wants a list
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs', path.stem))
    return cfg


def fit_workers(cfg: Config) -> str | None:
    """Drop, in place, what torch takes from a loader only if it has workers; returns a line."""
    dropped = []
    for key in (f'{split}_dataloader' for split in SPLITS):
        loader = cfg.get(key) or {}
        if loader.get('num_workers', 0) == 0:
            for setting in WITH_WORKERS:
                if loader.pop(setting, None):
                    dropped.append(f'{key}.{setting}')
    return f'Dropped {", ".join(dropped)}: num_workers is 0.' if dropped else None


def find_config(name: str) -> Path:
    """The config file that `name` means (see `look_up`).

    Raises:
        UserError: There is none; the message has the closest match.
    """
    if found := look_up(name):
        return found
    path = Path(name)
    if path.is_dir():
        raise UserError(f'{name} is a folder; name one config file in it.')
    known = {stem: stem for stem in config_names()}
    known |= {
        p.stem: str(p) for p in sorted([*Path('configs').glob('*.py'), *path.parent.glob('*.py')])
    }
    close = closest(path.stem, known, cutoff=0.4)
    hint = (
        f'did you mean {known[close]}?' if close else '`repnext-mm models` lists those there are.'
    )
    raise UserError(f'there is no config {name} (looked in {path.absolute()}); {hint}')


def _moved(node: Any, old: str, new: str) -> Any:
    """`node` with every path under `old` moved under `new`."""
    if isinstance(node, dict):
        return type(node)({key: _moved(value, old, new) for key, value in node.items()})
    if isinstance(node, list | tuple):
        return type(node)(_moved(value, old, new) for value in node)
    stem = old.rstrip('/')
    if isinstance(node, str) and (node.rstrip('/') == stem or node.startswith(f'{stem}/')):
        return new.rstrip('/') + node[len(stem) :]
    return node
