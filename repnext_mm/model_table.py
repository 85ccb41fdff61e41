"""The tables of docs/models.md and `configs/metafile.yml`: published and measured, side by side.

Published figures are data of this package (`published_results.json`, with their origin). Sizes and
costs are measured on the networks themselves, before and after each fusion plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import dump
from torch import nn

from .backbones import FAMILIES, names
from .checkpoints import PUBLISHED
from .checkpoints.published import names_for
from .complexity import count_macs, count_parameters
from .network import PLANS
from .published_results import LATENCIES, METHODS, TOP1, of_imagenet_config, published

PAPERS = {
    'repnext': 'https://arxiv.org/abs/2406.16004',
    'recnext': 'https://arxiv.org/abs/2412.19628',
    'inception_next': 'https://arxiv.org/abs/2303.16900',
}
#: The training form, computed branch by branch as published, and what each plan makes of it.
FORMS = ('training', *PLANS)
SIZES = (224, 512)
#: Published sizes are those of fused classifiers, but for InceptionNeXt, whose code does not fuse.
PUBLISHED_FORM = {'repnext': 'full', 'recnext': 'full', 'inception_next': 'training'}


PAGE = Path('docs', 'models.md')
BEGIN, END = '<!-- models:begin -->', '<!-- models:end -->'
PENDING, NONE = 'pending', '-'

Record = dict[str, Any]


def classifier_head(family: str, width: int) -> nn.Module:
    """The head for 1000 classes that published classifiers have once they are fused."""
    if family == 'inception_next':
        from timm.models.inception_next import MlpClassifierHead

        return MlpClassifierHead(width, 1000)
    return nn.Linear(width, 1000)


def measure(name: str) -> Record:
    """Parameters and multiplications of a network's backbone in every form, and its head's."""
    family, arch = names()[name]
    record: Record = {'Parameters': {}, **{f'MACs at {size}x{size}': {} for size in SIZES}}
    with torch.device('meta'):
        for form in FORMS:
            deploy = False if form == 'training' else form
            model = family(arch, deploy=deploy, fast=False).eval()
            record['Parameters'][form] = count_parameters(model)
            for size in SIZES:
                macs = count_macs(model, (size, size))
                record[f'MACs at {size}x{size}'][form] = macs
        head = classifier_head(name.removesuffix(f'_{arch}'), model.channels[-1])
    record['Classifier parameters'] = count_parameters(head)
    return record


def metafile(root: Path, measurements: dict[str, Record]) -> Record:
    """What `configs/metafile.yml` holds: every backbone, then every config of the recipes."""
    models = [
        backbone_record(family, arch, measurements[f'{family}_{arch}'])
        for family, cls in FAMILIES.items()
        for arch in cls.arch_zoo
    ]
    models += config_records(root)
    collections = [
        {'Name': cls.__name__, 'Paper': {'URL': PAPERS[family]}} for family, cls in FAMILIES.items()
    ]
    return {'Collections': collections, 'Models': models}


def backbone_record(family: str, arch: str, measured: Record) -> Record:
    """One backbone: its weights, its measured cost, its published figures."""
    cls = FAMILIES[family]
    names = names_for(cls.__name__, arch, fused=False)
    figures = published('imagenet', f'{family}_{arch}')
    record: Record = {
        'Name': f'{family}_{arch}',
        'In Collection': cls.__name__,
        'Metadata': {'Measured': measured},
        'Results': [
            {'Task': 'Image Classification', 'Dataset': 'ImageNet-1k', 'Published': figures}
        ],
    }
    return record | ({'Weights': PUBLISHED[names[0]].url} if names else {})


def config_records(root: Path) -> list[Record]:
    """Every config with a published recipe: its published figures, and what we have reached."""
    records = []
    for name, method in METHODS.items():
        for family, cls in FAMILIES.items():
            for arch in cls.arch_zoo:
                config = f'configs/{name}_{family}_{arch}_{method.suffix}.py'
                if not (root / config).exists():
                    continue
                figures = published(method.section, f'{family}_{arch}')
                result: Record = {
                    'Task': method.task,
                    'Dataset': method.dataset,
                    'Published': {k: figures[k] for k in method.columns if figures} or NONE,
                    'Measured': PENDING,
                }
                record: Record = {
                    'Name': Path(config).stem,
                    'In Collection': cls.__name__,
                    'Config': config,
                    'Results': [result],
                }
                weights = PUBLISHED.get(f'{family}_{arch}_{method.suffix}')
                records.append(record | ({'Weights': weights.url} if weights else {}))
    return records + imagenet_records(root)


def imagenet_records(root: Path) -> list[Record]:
    """The configs of ImageNet: the published figure of their own recipe, and what we reached."""
    records = []
    collections = {name: family.__name__ for name, (family, _) in names().items()}
    for path in sorted((root / 'configs' / 'imagenet').glob('*_imagenet.py')):
        network, figures = of_imagenet_config(path.stem) or ('', {})
        result = {
            'Task': 'Image Classification',
            'Dataset': 'ImageNet-1k',
            'Published': figures or NONE,
            'Measured': PENDING,
        }
        records.append(
            {
                'Name': path.stem,
                'In Collection': collections[network],
                'Config': path.relative_to(root).as_posix(),
                'Results': [result],
            }
        )
    return records


def tables(meta: Record) -> str:
    """The block of docs/models.md, from a metafile's content."""
    models = {model['Name']: model for model in meta['Models']}
    blocks = []
    for family, cls in FAMILIES.items():
        rows = [_result_cells(models, family, arch) for arch in cls.arch_zoo]
        # A method that no variant of the family has a config for has no columns.
        header = [key for key in rows[0] if any(row[key] != NONE for row in rows)]
        blocks.append(
            f'### {cls.__name__}\n\n'
            + _table(header, ([row[key] for key in header] for row in rows))
        )
    costs = [
        [f'{cls.__name__} {arch}', *_cost_cells(models[f'{family}_{arch}'])]
        for family, cls in FAMILIES.items()
        for arch in cls.arch_zoo
    ]
    titles = ['backbone', 'parameters (M)', *(f'MACs (G) at {size}x{size}' for size in SIZES)]
    blocks.append(
        '<details><summary>Backbones before and after each plan, measured</summary>\n\n'
        f'Each cell: {" / ".join(FORMS)}. MACs are the multiply-accumulates of convolutions and '
        "matrix products, by torch's `FlopCounterMode`; norms, activations, additions and "
        'upsampling are not in them.\n\n' + _table(titles, costs) + '\n\n</details>'
    )
    return '\n\n'.join(blocks)


def _result_cells(models: dict[str, Record], family: str, arch: str) -> dict[str, str]:
    """One row of a family's table by column title."""
    measured = models[f'{family}_{arch}']['Metadata']['Measured']
    figures = models[f'{family}_{arch}']['Results'][0]['Published']
    form = PUBLISHED_FORM[family]
    parameters = measured['Parameters'][form] + measured['Classifier parameters']
    cells = {
        'arch': arch,
        'params (M), published': str(figures['params_M']),
        'params (M), measured': f'{parameters / 1e6:.2f}',
        'MACs (G), published': str(figures['macs_G_224']),
        'MACs (G), measured': f'{measured["MACs at 224x224"][form] / 1e9:.2f}',
        **{
            f'{title}, published': str(figures.get(column, NONE))
            for column, title in (TOP1 | LATENCIES).items()
        },
    }
    for name, method in METHODS.items():
        config = models.get(f'{name}_{family}_{arch}_{method.suffix}')
        result = config['Results'][0] if config else dict(Published=NONE, Measured=NONE)
        theirs: Any = result['Published']
        ours = result['Measured']
        if theirs != NONE:
            theirs = ' / '.join(map(str, theirs.values()))
        cells |= {f'{method.title}, published': theirs, f'{method.title}, ours': ours}
    return cells


def _cost_cells(model: Record) -> list[str]:
    measured = model['Metadata']['Measured']
    counts = [measured['Parameters'].values()]
    counts += [measured[f'MACs at {size}x{size}'].values() for size in SIZES]
    return [
        ' / '.join(f'{count / unit:.2f}' for count in row)
        for row, unit in zip(counts, (1e6, 1e9, 1e9), strict=True)
    ]


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    rule = ['---', *['---:'] * (len(header) - 1)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, rule, *rows))


def with_tables(page: str, meta: Record) -> str:
    """`page` with the block between its markers written again.

    Raises:
        ValueError: It does not have each marker once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(
            f'{PAGE} must have {BEGIN} and {END} once each, in this order; the tables go '
            'between them.'
        )
    return f'{before}{BEGIN}\n\n{tables(meta)}\n\n{END}{after}'


def generate(root: Path, track: Callable[[list[str]], Iterable[str]] = iter) -> dict[Path, str]:
    """The generated files below `root` and their content; `track` may show the progress."""
    meta = metafile(root, {name: measure(name) for name in track(list(names()))})
    header = '# Written by tools/model_table.py. Published figures: see published_results.json.\n'
    page = root / PAGE
    return {
        root / 'configs' / 'metafile.yml': header
        + dump(meta, file_format='yaml', sort_keys=False, width=100),
        page: with_tables(page.read_text('utf-8'), meta),
    }


def check(files: dict[Path, str]) -> None:
    """Compare generated content with what is on disk.

    Raises:
        ValueError: A file differs or is missing.
    """
    stale = [p.name for p, text in files.items() if not p.exists() or p.read_text('utf-8') != text]
    if stale:
        raise ValueError(
            f'{" and ".join(stale)} are not what the code says; run "python tools/model_table.py".'
        )
