"""Published accuracy against measured time, from results of `benchmark throughput`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..files import read_json
from ..published_results import published, published_results
from ..visualization.curves import save_figure
from .tables import Record

#: What a picture may have upwards: columns of the published figures, best first.
METRICS: dict[str, tuple[str, Sequence[str]]] = {
    # Recipes are not mixed: the E forms were published under StarNet's alone.
    'top1': ('top-1 (%), published', ('top1_distilled', 'top1')),
    'top1_starnet': ("top-1 (%), StarNet's recipe, published", ('top1_starnet_distilled',)),
    'box_AP': ('box AP, Mask R-CNN 1x, published', ('box_AP',)),
}
#: A color and a marker for each family that is drawn often; others take what is left.
STYLES = {
    'repnext': ('#c0392b', 'o'),
    'recnext_m': ('#1f5f99', 's'),
    'recnext_a': ('#1a9988', 'D'),
    'recnext_l': ('#6c8ebf', '^'),
    'inception_next': ('#7d3c98', 'v'),
    'repvit': ('#e08e0b', 'P'),
}
OTHERS = ('#555555', '#8c6d31', '#2e8b57', '#b565a7', '#808000')


def accuracy(name: str, metric: str) -> float | None:
    """The published figure of a network; None where there is none."""
    rivals: dict[str, Any] = published_results()['_rivals']
    figures = dict(rivals.get(name) or {})
    for section in ('imagenet', 'coco_mask_rcnn_1x'):
        figures |= published(section, name)
    return next((figures[c] for c in METRICS[metric][1] if c in figures), None)


def points(result: Record, metric: str) -> dict[str, tuple[float, float]]:
    """Milliseconds per image and accuracy of every network that has a figure."""
    found = {}
    for row in result['comparison']['rows']:
        if '/' in row['variant']:  # a second way of computing a network
            continue
        value = accuracy(row['variant'].partition('.')[0], metric)
        if value is not None:
            found[row['variant']] = (row['ms_per_image'], value)
    return found


def draw(source: Path, out_file: Path, metric: str) -> Path:
    """Draw a picture from a JSON result; returns `out_file`.

    Raises:
        UserError: It is no such result, or none of its networks has a published figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    try:
        result = read_json(source)
        named = points(result, metric)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{source} is no result of benchmark throughput --json ({error!r}).'
        ) from error
    if not named:
        raise UserError(f'no network of {source} has a published {metric}.')
    figure = Figure(figsize=(8, 5.2), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    families: dict[str, list[str]] = {}
    for name in named:
        families.setdefault(_family(name), []).append(name)
    others = iter(OTHERS * len(families))
    for number, (family, members) in enumerate(sorted(families.items())):
        members.sort(key=lambda name: named[name])
        color, marker = STYLES.get(family) or (next(others), 'X')
        xs, ys = zip(*(named[name] for name in members), strict=True)
        axes.plot(xs, ys, marker=marker, color=color, label=family.replace('_', ' '))
        # Above for one family and below for the next, as neighbors are near each other.
        offset, side = ((0, 6), 'bottom') if number % 2 else ((0, -7), 'top')
        for name in members:
            axes.annotate(
                name.removeprefix(f'{_stem(family)}_') or name,
                named[name],
                offset,
                textcoords='offset points',
                fontsize=7,
                color=color,
                horizontalalignment='center',
                verticalalignment=side,
            )
    axes.margins(0.07)
    settings, environment = result['settings'], result['environment']
    size = 'x'.join(map(str, settings['size']))
    axes.set(xlabel=f'ms per image, measured at {size}', ylabel=METRICS[metric][0])
    axes.set_title(_machine(environment, settings), fontsize='small')
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize='small')
    return save_figure(figure, out_file)


def _family(name: str) -> str:
    """The part of a name that its variants share, series of RecNeXt apart."""
    head, _, tail = name.rpartition('_')
    if name.startswith('recnext'):
        series = name.removeprefix('recnext_')[0]
        return f'recnext_{series if series in "ma" else "l"}'
    return head.partition('_m')[0] if head.startswith('repvit') else head or tail


def _stem(family: str) -> str:
    """What the names of a family's variants begin with."""
    return 'recnext' if family.startswith('recnext') else family


def _machine(environment: Record, settings: Record) -> str:
    versions = environment['versions']
    gpu = (environment.get('gpu') or {}).get('name', '')
    device = gpu if settings['device'] == 'cuda' else environment['cpu']
    threads = environment['threads']
    parts = [str(device), f'{threads} thread{"s" * (threads != 1)}', f'torch {versions["torch"]}']
    return ', '.join([*parts, 'float32'])
