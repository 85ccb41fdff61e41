"""What `repnext-mm look` does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DefaultScope

from ..datasets.folders import DataError, Example, LabeledFolder, read_folder, split_examples
from ..engine.errors import UserError, run_tool, sigterm_raises
from ..engine.inference import Result, TrainedModel
from ..files import free_folder
from ..prediction.outputs import beside
from ..prediction.predictor import Predictor
from ..prediction.truth import truth_of
from ..program import HelpFormatter, program
from ..runtimes.predictor import draw
from ..visualization import read_scalars
from . import cam, figures, network
from .classes import Pixels, compare_maps
from .data import describe_data
from .detection import KINDS, Evaluation, Scene, evaluate
from .page import Page

#: Images whose inside is shown, and over which receptive fields are averaged.
INSIDE, AVERAGED = 2, 4
#: Side of the images that receptive fields are computed on.
FIELD_SIZE = 512
#: Least score of a detection in a picture and in the confusion matrix.
SHOWN = 0.3
VAL_SHARE = 0.2


def look_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm look`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program('look'),
        usage='%(prog)s CHECKPOINT DATA [options]',
        description='Write one page about a trained model and its data.',
        formatter_class=HelpFormatter,
    )
    add: Any = parser.add_argument
    add('checkpoint', help='checkpoint of a run')
    add('data', help='folder of images with labels, of a format that train reads')
    add('--out', type=Path, metavar='DIR', help='folder for the page (None: look/ beside the run)')
    add('--split', choices=('train', 'val', 'test'), help='evaluated (None: val)')
    add('--limit', type=int, default=500, metavar='N', help='most images that are evaluated')
    add(
        '--against',
        nargs='+',
        default=[],
        metavar='CKPT',
        help='checkpoints whose receptive fields are shown beside',
    )
    add('--format', help='of the labels (None: recognized)')
    add('--group-by', metavar='REGEX', help='as for the training, where no split says')
    add('--val-share', type=float, default=VAL_SHARE, metavar='PART', help='as for the training')
    add('--config', help='of a checkpoint that does not store it')
    add('--device', help='such as cpu or cuda:0 (None: a GPU if there is one)')  # fmt: skip
    args = parser.parse_args(argv)

    def run() -> None:
        path = look(args)
        print(f'Wrote {path} and {path.parent / "pictures"}.')

    with sigterm_raises():
        return run_tool(run)


def look(args: argparse.Namespace) -> Path:
    """Write the page; returns its path.

    Raises:
        UserError: Checkpoint and data cannot be read, or do not fit each other.
    """
    if args.limit < 1:
        raise UserError(f'--limit {args.limit} must be at least 1.')
    predictor = Predictor(args.checkpoint, args.config, args.device)
    trained = predictor.trained
    if trained is None:
        raise UserError(f'{args.checkpoint} is an exported file; give the checkpoint of a run.')
    try:
        folder = read_folder(args.data, args.format)
        splits = dict(folder.splits)
        if 'val' not in splits and 'train' in splits:
            pair = split_examples(splits['train'], args.val_share, args.group_by)
            splits['train'], splits['val'] = pair
    except DataError as error:
        raise UserError(str(error)) from error
    unknown = [name for name in folder.classes if name not in predictor.classes]
    if unknown:
        raise UserError(
            f'{folder.root} has the class {unknown[0]!r}, and {args.checkpoint} was trained on '
            f'{", ".join(predictor.classes[:8])}; give the data that it was trained on.'
        )
    split = args.split or ('val' if 'val' in splits else next(iter(splits)))
    if split not in splits:
        raise UserError(f'{folder.root} has no split {split}; there are {", ".join(splits)}.')
    examples = splits[split][: args.limit]
    checkpoint = Path(args.checkpoint)
    page = Page(
        free_folder(args.out or checkpoint.parent / 'look'),
        f'{checkpoint.name} on {folder.root.resolve().name}',
        f'{folder.format}; evaluated on {len(examples)} images of {split}; {trained.task}; '
        f'{len(predictor.classes)} classes.',
    )
    page.section('Training')
    try:
        page.chart('curves', figures.curves(read_scalars(checkpoint.parent)), wide=True)
    except FileNotFoundError:
        page.text(f'There is no log of a training beside {checkpoint.name}.', note=True)
    results = _predict(predictor, folder, examples)
    truths = [truth_of(folder, example, predictor.classes) for example in examples]
    report = {'detection': _detection, 'segmentation': _segmentation}.get(
        trained.task, _classification
    )
    report(page, predictor, folder, examples, truths, results)
    _inside(page, trained, predictor, folder, examples, results)
    _fields(page, trained, folder, examples, args.against)
    _data(page, folder, {k: v for k, v in splits.items() if k in ('train', 'val')})
    return page.write()


def _track(items: Sequence[Any], title: str) -> Iterable[Any]:
    import sys

    if not sys.stdout.isatty():
        return items
    from rich.progress import track

    return track(items, title, transient=True)


def _predict(
    predictor: Predictor, folder: LabeledFolder, examples: Sequence[Example]
) -> list[Result]:
    results = []
    for example in _track(examples, 'predicting'):
        try:
            results.append(predictor(folder.root / example.file))
        except ValueError as error:
            raise UserError(str(error)) from error
    return results


def _rgb(
    predictor: Predictor,
    folder: LabeledFolder,
    example: Example,
    truth: Result,
    result: Result,
) -> np.ndarray:
    """Truth at the left and prediction at the right, `(H, W, 3)` RGB."""
    image = predictor.read(folder.root / example.file)
    drawn = [
        draw(image, shown, predictor.settings, threshold)
        for shown, threshold in ((truth, 0.0), (result, SHOWN))
    ]
    return beside(*drawn)[..., ::-1]


# --- detectors


def _detection(
    page: Page,
    predictor: Predictor,
    folder: LabeledFolder,
    examples: Sequence[Example],
    truths: Sequence[Result],
    results: Sequence[Result],
) -> None:
    masks = folder.kind == 'polygons' and any('masks' in result for result in results)
    scenes = []
    for example, truth, result in zip(examples, truths, results, strict=True):
        crowds = _crowds(folder, example, predictor)
        scenes.append(Scene((example.height, example.width), truth, crowds, result))
    evaluation = evaluate(scenes, predictor.classes, SHOWN, masks)
    page.section('Precision')
    page.text('Of masks.' if masks else 'Of boxes.', note=True)
    page.table(
        [*evaluation.summary], [['-' if np.isnan(v) else f'{v:.3f}' for v in
                                 evaluation.summary.values()]]
    )  # fmt: skip
    page.chart('precision_recall', figures.precision_recall(evaluation), 'Precision and recall, '
               'at an IoU of 0.5')  # fmt: skip
    page.heading('By class')
    rows = []
    for i in sorted(range(len(evaluation.classes)), key=lambda i: -evaluation.objects[i]):
        if evaluation.objects[i]:
            values = (f'{value:.3f}' for value in evaluation.rows[i].values())
            rows.append([evaluation.classes[i], evaluation.objects[i], *values])
    page.table(['class', 'objects', 'AP', 'AP50', 'AP75'], rows)
    page.section('Errors')
    page.chart('errors', figures.error_kinds(evaluation))
    page.text(
        'Kinds as TIDE defines them (arXiv 2008.08115): what AP at an IoU of 0.5 would gain if the '
        'errors of one kind were mended.',
        note=True,
    )
    counts = {kind: sum(f.kind == kind for f in evaluation.found) for kind in KINDS}
    page.table(
        ['kind', 'number', 'AP50 gained'],
        [[text, counts[k], f'{evaluation.gains[k]:.3f}'] for k, text in KINDS.items()],
    )
    names = list(evaluation.classes)
    page.chart(
        'confusion',
        figures.confusion(evaluation.confusion, [*names, 'nothing there'], [*names, 'not found']),
        f'Objects by class, with detections of score {SHOWN} and more',
    )
    _worst_detections(page, predictor, folder, examples, truths, results, evaluation)


def _crowds(folder: LabeledFolder, example: Example, predictor: Predictor) -> Result:
    """Groups of objects, in the form of objects."""
    groups = [replace(item, crowd=False) for item in example.objects if item.crowd]
    found = truth_of(folder, replace(example, objects=groups), predictor.classes)
    found.pop('scores')
    return found


def _worst_detections(
    page: Page,
    predictor: Predictor,
    folder: LabeledFolder,
    examples: Sequence[Example],
    truths: Sequence[Result],
    results: Sequence[Result],
    evaluation: Evaluation,
) -> None:
    """Images with the most errors: of all, by class, and by the size of the objects."""
    errors: list[list[Any]] = [[] for _ in examples]
    for item in evaluation.found:
        if item.kind not in ('right', 'ignored') and (item.score is None or item.score >= SHOWN):
            errors[item.image].append(item)
    reasons: dict[int, list[str]] = {}

    def note(index: int, reason: str) -> None:
        reasons.setdefault(index, []).append(reason)

    for index in sorted(range(len(examples)), key=lambda i: -len(errors[i]))[:6]:
        if errors[index]:
            note(index, 'most errors of all')
    order = sorted(range(len(evaluation.classes)), key=lambda i: -evaluation.objects[i])[:8]
    for label in order:
        numbers = [sum(item.label == label for item in found) for found in errors]
        if max(numbers, default=0):
            note(int(np.argmax(numbers)), f'most errors of {evaluation.classes[label]}')
    for name, low, high in (('small', 0, 32), ('medium', 32, 96), ('large', 96, 1e9)):
        numbers = []
        for index, found in enumerate(errors):
            boxes = truths[index]['boxes']
            sides = np.sqrt(np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), 1))
            missed = [i.truth for i in found if i.kind == 'miss']
            numbers.append(sum(low <= sides[i] < high for i in missed))
        if max(numbers, default=0):
            note(int(np.argmax(numbers)), f'most {name} objects missed')
    page.section('Worst images')
    if not reasons:
        page.text('No image has an error.')
        return
    captions = {i: f'{", ".join(texts)}; {_listed(errors[i])}' for i, texts in reasons.items()}
    _show_beside(page, predictor, folder, examples, truths, results, captions)


def _show_beside(
    page: Page,
    predictor: Predictor,
    folder: LabeledFolder,
    examples: Sequence[Example],
    truths: Sequence[Result],
    results: Sequence[Result],
    captions: Mapping[int, str],
) -> None:
    """Pictures of the images that have a caption."""
    page.text('The truth at the left, the prediction at the right.', note=True)
    page.pictures(
        [
            (
                f'worst_{number}',
                _rgb(predictor, folder, examples[i], truths[i], results[i]),
                f'{examples[i].file}: {caption}',
            )
            for number, (i, caption) in enumerate(captions.items(), 1)
        ],
        most=900,
    )


def _listed(found: Sequence[Any]) -> str:
    counts = {kind: sum(item.kind == kind for item in found) for kind in KINDS}
    return ', '.join(f'{n} {KINDS[k].partition(":")[0]}' for k, n in counts.items() if n)


# --- segmentors and classifiers


def _segmentation(
    page: Page,
    predictor: Predictor,
    folder: LabeledFolder,
    examples: Sequence[Example],
    truths: Sequence[Result],
    results: Sequence[Result],
) -> None:
    pairs = [(t['classes'], r['classes']) for t, r in zip(truths, results, strict=True)]
    found: Pixels = compare_maps(pairs, predictor.classes)
    iou, total = found.iou, found.confusion.sum(1)
    present = total > 0
    page.section('IoU')
    accuracy = np.diag(found.confusion).sum() / max(total.sum(), 1)
    page.table(
        ['mIoU', 'pixel accuracy', 'wrong pixels near an edge'],
        [[f'{np.nanmean(iou):.3f}', f'{accuracy:.3f}', f'{found.border:.0%}']],
    )
    order = [i for i in np.argsort(-total, kind='stable') if present[i]]
    page.chart(
        'iou',
        figures.bars(
            [found.classes[i] for i in order], {'IoU': [float(iou[i]) for i in order]}, 'IoU'
        ),
    )
    page.table(
        ['class', 'IoU', 'recall', 'part of all pixels'],
        [
            [
                found.classes[i],
                f'{iou[i]:.3f}',
                f'{found.confusion[i, i] / total[i]:.3f}',
                f'{total[i] / total.sum():.1%}',
            ]
            for i in order
        ],
    )
    page.section('Errors')
    page.chart(
        'confusion',
        figures.confusion(found.confusion, found.classes, found.classes),
        'Pixels by class',
    )
    page.section('Worst images')
    means = [float(np.nanmean(row)) if np.isfinite(row).any() else 1.0 for row in found.images]
    reasons: dict[int, list[str]] = {}
    for i in sorted(range(len(examples)), key=lambda i: means[i])[:6]:
        reasons.setdefault(i, []).append('lowest mIoU of all')
    table = np.array(found.images)
    for label in order[:8]:
        worst = int(np.nanargmin(table[:, label]))
        text = f'lowest IoU of {found.classes[label]} ({table[worst, label]:.2f})'
        reasons.setdefault(worst, []).append(text)
    captions = {
        i: f'mIoU {means[i]:.3f} over its classes; {", ".join(texts)}'
        for i, texts in reasons.items()
    }
    _show_beside(page, predictor, folder, examples, truths, results, captions)


def _classification(
    page: Page,
    predictor: Predictor,
    folder: LabeledFolder,
    examples: Sequence[Example],
    truths: Sequence[Result],
    results: Sequence[Result],
) -> None:
    true = np.array([truth['probabilities'].argmax() for truth in truths])
    scores = np.array([result['probabilities'] for result in results])
    chosen = scores.argmax(1)
    names = predictor.classes
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, (true, chosen), 1)
    page.section('Accuracy')
    page.table(['top-1', 'images'], [[f'{(true == chosen).mean():.3f}', len(true)]])
    total = table.sum(1)
    page.table(
        ['class', 'images', 'recall', 'precision'],
        [
            [
                names[i],
                total[i],
                f'{table[i, i] / total[i]:.3f}',
                f'{table[i, i] / max(table[:, i].sum(), 1):.3f}',
            ]
            for i in np.argsort(-total, kind='stable')
            if total[i]
        ],
    )
    page.section('Errors')
    page.chart('confusion', figures.confusion(table, names, names), 'Images by class')
    wrong = [i for i in np.argsort(-scores.max(1), kind='stable') if true[i] != chosen[i]]
    page.section('Worst images')
    if not wrong:
        page.text('No image has an error.')
    page.pictures(
        [
            (
                f'worst_{number}',
                predictor.read(folder.root / examples[i].file)[..., ::-1],
                f'{examples[i].file}: {names[chosen[i]]} {scores[i].max():.2f}, is '
                f'{names[true[i]]}',
            )
            for number, i in enumerate(wrong[:12], 1)
        ],
        most=320,
    )


# --- inside the network


def _inside(
    page: Page,
    trained: TrainedModel,
    predictor: Predictor,
    folder: LabeledFolder,
    examples: Sequence[Example],
    results: Sequence[Result],
) -> None:
    backbone = _backbone(trained)
    inputs = [_input(trained, predictor.read(folder.root / e.file)) for e in examples[:INSIDE]]
    page.section('Feature maps')
    for number, (example, x) in enumerate(zip(examples[:INSIDE], inputs, strict=True), 1):
        maps = network.branch_maps(backbone, x)
        if not maps:
            page.text('This backbone has no token mixers to look into.', note=True)
            break
        image = predictor.read(folder.root / example.file)[..., ::-1]
        page.chart(
            f'branches_{number}', figures.branch_grid(image, maps),
            f'{example.file}: how strongly the branches of the last token mixer of each stage '
            'answer',
            wide=True,
        )  # fmt: skip
    page.section('Where it looks')
    if not cam.available():
        page.text(f'Maps of attention need the package grad-cam: {cam.INSTALL}.')
        return
    rows = []
    for example, x, result in zip(examples[:INSIDE], inputs, results[:INSIDE], strict=True):
        image = predictor.read(folder.root / example.file)[..., ::-1]
        rows.append((image, _attention(trained, predictor, x, image.shape[:2], result)))
    page.chart('attention', figures.overlays(rows), wide=True)
    page.text(
        'Grad-CAM (arXiv 1610.02391) of single decisions, and EigenCAM (arXiv 2008.00299) of the '
        'same feature maps, which asks for no decision; of the last stage that the model uses.',
        note=True,
    )


def _backbone(trained: TrainedModel) -> Any:
    model: Any = trained.model
    return model.network if trained.task == 'classification' else model.backbone


def _input(trained: TrainedModel, image: np.ndarray) -> torch.Tensor:
    """The image as the backbone gets it, `(1, 3, H, W)`."""
    from mmengine.dataset import pseudo_collate

    sample = trained.transform(image)
    device = next(trained.model.parameters()).device
    if trained.task == 'classification':
        return sample['inputs'][None].to(device)
    scope = trained.cfg.get('default_scope')
    with DefaultScope.overwrite_default_scope(scope), torch.no_grad():
        return trained.model.data_preprocessor(pseudo_collate([sample]), training=False)['inputs']


def _attention(
    trained: TrainedModel,
    predictor: Predictor,
    x: torch.Tensor,
    original: tuple[int, ...],
    result: Result,
) -> list[tuple[str, np.ndarray]]:
    """Maps `(H, W)` of the picture's own part of the input, with titles."""
    model: Any = trained.model
    layer, features = _last_maps(trained, x)
    factors = x.shape[3] / original[1], x.shape[2] / original[0]
    factor = min(factors)
    inside = slice(0, round(original[0] * factor)), slice(0, round(original[1] * factor))
    scores: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = []
    names = predictor.classes
    if trained.task == 'classification':
        for label in np.argsort(-result['probabilities'])[:2]:
            title = f'{names[label]} {result["probabilities"][label]:.2f}'
            scores.append((title, cam.class_score(model, int(label))))
        inside = slice(0, x.shape[2]), slice(0, x.shape[3])
    elif trained.task == 'segmentation':
        labels, pixels = np.unique(result['classes'], return_counts=True)
        for label in labels[np.argsort(-pixels)][:2]:
            scores.append((names[label], cam.pixels_score(model, int(label))))
        inside = slice(0, x.shape[2]), slice(0, x.shape[3])
    else:
        for i in range(min(2, len(result['scores']))):
            box, label = result['boxes'][i] * factor, int(result['labels'][i])
            title = f'{names[label]} {result["scores"][i]:.2f}'
            scores.append((title, cam.box_score(model, box, label)))
    found = [
        (f'Grad-CAM: {title}', cam.grad_cam(model, layer, x, score)[inside])
        for title, score in scores
    ]
    eigen = cam.eigen_cam(features)
    rows, columns = (
        max(1, round(size * part.stop / whole))
        for size, part, whole in zip(eigen.shape, inside, x.shape[2:], strict=True)
    )
    return [*found, ('EigenCAM', eigen[:rows, :columns])]


def _last_maps(trained: TrainedModel, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The module that returns the last feature map `(1, C, h, w)` of the backbone, and the map."""
    backbone = _backbone(trained)
    outputs: list[tuple[Any, torch.Tensor]] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] > 1:
            outputs.append((module, output))

    handles = [m.register_forward_hook(keep) for m in backbone.modules() if m is not backbone]
    try:
        with torch.no_grad():
            found = backbone(x)
    finally:
        for handle in handles:
            handle.remove()
    last = found[-1] if isinstance(found, list | tuple) else None
    for module, output in reversed(outputs):
        if last is None or output is last or output.shape == last.shape:
            return module, output
    return outputs[-1]


def _fields(
    page: Page,
    trained: TrainedModel,
    folder: LabeledFolder,
    examples: Sequence[Example],
    against: Sequence[str],
) -> None:
    page.section('Receptive fields')
    own = _stages(trained)
    networks = {'trained': own, 'untrained': network.untrained(own)}
    networks |= {Path(path).stem: _stages(TrainedModel(path)) for path in against}
    images = [_square(trained.read(folder.root / e.file)) for e in examples[:AVERAGED]]
    device = next(trained.model.parameters()).device
    tensors = [image.to(device) for image in images]
    rows = {
        name: network.receptive_fields(net.to(device), tensors) for name, net in networks.items()
    }
    sides = {
        name: {
            stage: ' / '.join(str(network.extent(f, share)) for share in network.SHARES)
            for stage, f in row.items()
        }
        for name, row in rows.items()
    }
    page.chart('receptive_fields', figures.fields(rows, sides), wide=True)
    page.text(
        f'How much the pixels of {FIELD_SIZE} x {FIELD_SIZE} images move the middle of the output '
        '(arXiv 1701.04128), with the sides in pixels of the squares that contain 50 % / 90 % of '
        'it.',
        note=True,
    )
    if given := network.recursive_fields(_backbone(trained)):
        page.text(
            "One recursive convolution reaches kernel x 2^level cells by RecNeXt's paper: "
            + '; '.join(f'{stage}: {text}' for stage, text in given.items())
        )


def _stages(trained: TrainedModel) -> Any:
    """A network that returns the feature map of each stage."""
    model: Any = _backbone(trained)
    if trained.task != 'classification':
        return model

    class Stages(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, x: torch.Tensor) -> Any:
            if hasattr(self.network, 'forward_intermediates'):
                return self.network.forward_intermediates(x, intermediates_only=True)
            return (self.network.forward_features(x),)

    return Stages()


def _square(image: np.ndarray) -> torch.Tensor:
    from PIL import Image

    resized = Image.fromarray(np.ascontiguousarray(image[..., ::-1])).resize(
        (FIELD_SIZE, FIELD_SIZE)
    )
    x = torch.from_numpy(np.asarray(resized, np.float32)).permute(2, 0, 1)[None]
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    deviation = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    return (x - mean) / deviation


# --- the data


def _data(page: Page, folder: LabeledFolder, splits: dict[str, list[Example]]) -> None:
    found = describe_data(folder, splits, lambda items: _track(items, 'hashing'))
    page.section('Data')
    page.table(['split', 'images'], [[name, len(part)] for name, part in splits.items()])
    label = {'masks': 'pixels (millions)', 'classes': 'images'}.get(folder.kind, 'objects')
    page.chart('classes', figures.bars(folder.classes, found.counts, label))
    if found.sides:
        page.chart('boxes', figures.boxes(found), wide=True)
    page.heading('Nearly equal images in train and val')
    if found.twins:
        page.text(f'{len(found.twins)} pairs by their perceptual hash; val says too much then.')
        page.table(
            ['train', 'val', 'bits of 64 that differ'],
            [[a.file, b.file, bits] for a, b, bits in found.twins[:20]],
        )
    else:
        page.text('None by their perceptual hash.')
    if found.most:
        page.heading('Images with the most objects')
        page.table(['image', 'objects'], [[e.file, n] for e, n in found.most])
    if folder.kind in ('boxes', 'polygons'):
        names = ', '.join(e.file for e in found.none[:10])
        page.heading('Images without objects')
        more = ' ...' if len(found.none) > 10 else ''
        page.text(f'{len(found.none)}: {names}{more}' if found.none else 'None.')
