"""What `repnext-mm train` does with a folder: a config for it, that trained, and pictures."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.published import PUBLISHED, names_for
from ..datasets.folders import FORMATS, DataError, Example, LabeledFolder, read_folder
from ..datasets.folders.splitting import split_examples
from ..engine.cli import Trained, run_command, train, train_parser
from ..engine.errors import UserError, is_first
from ..engine.progress import known_metrics
from ..files import FULL, free_folder
from ..program import command
from ..text import closest, printable
from .config import Plan, Weights, write_config
from .heads import CHOICE, HEADS, build_model_config, cost
from .settings import choose

#: Part of the images that validate where no split says.
VAL_SHARE = 0.2
MODEL = 'repnext_m0'
#: Images of val that are drawn at the end.
PICTURED = 8
#: Complete models that are published, by their head: how their names end.
WHOLE = {'mask_rcnn': 'coco', 'semantic_fpn': 'ade20k'}
#: Options that are for folders alone, by the name of their argument.
OWN = (
    *('model', 'head', 'lite', 'pretrained', 'format', 'classes', 'size', 'batch_size', 'lr'),
    *('val_share', 'group_by', 'dry_run'),
)


def train_main(argv: Sequence[str] | None = None) -> int:
    """Command line of `repnext-mm train`; returns the exit code."""
    parser = train_parser()
    parser.usage = '%(prog)s DATA|CONFIG [options]'
    parser.description = 'Train a model on a folder of labeled images, or as a config says.'
    _add_options(parser)
    typed = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda args: _train(args, typed), parser, argv)


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('with a folder in place of a config')
    add: Any = group.add_argument
    add('--model', metavar='NAME', help=f'backbone (None: {MODEL})')
    add('--head', metavar='NAME', choices=tuple(HEADS), help=f'of {", ".join(HEADS)}')
    add('--lite', action='store_true', help='a narrow neck and head with depthwise convolutions')
    add('--pretrained', metavar='WEIGHTS', help='none, imagenet, or a checkpoint')
    add('--format', metavar='NAME', choices=tuple(FORMATS), help=f'of {", ".join(FORMATS)}')
    add('--classes', metavar='A,B', help='train on these alone, in this order')
    add('--size', type=int, metavar='N', help='of images (None: from the sizes of objects)')
    add('--batch-size', type=int, metavar='N', help='images per step (None: from memory)')
    add('--lr', type=float, metavar='X', help='learning rate (None: from the batch)')
    part = f'of images to validate with (None: {VAL_SHARE}; 0: all)'
    add('--val-share', type=float, metavar='X', help=part)
    add('--group-by', metavar='REGEX', help='equal matches in names stay in one split')
    add('--dry-run', action='store_true', help='write the config and stop')


def _train(args: argparse.Namespace, typed: Sequence[str]) -> None:
    if not _is_data(args.config):
        if given := [
            k for k in OWN if getattr(args, k) is not None and getattr(args, k) is not False
        ]:
            option = given[0].replace('_', '-')
            raise UserError(
                f'--{option} is for a folder of images, and {args.config} is none; change the '
                'config, or use --cfg-options.'
            )
        train(args)
        return
    if args.launcher != 'none':
        raise UserError(
            'several processes train a config: write it with --dry-run, and launch with that.'
        )
    if args.resume:
        raise UserError(
            '--resume continues a config: give the one in the work dir in place of the folder.'
        )
    if args.iters:
        raise UserError('a run on a folder counts epochs; give --epochs.')
    try:
        plan = make_plan(args, typed)
        path = write_config(plan)
    except DataError as error:
        raise UserError(str(error)) from error
    except ValueError as error:  # of a network's name, or a head without a light form
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno in FULL:
            raise  # it is said as everywhere
        raise UserError(f'the config cannot be written: {error}.') from error
    say(f'Wrote {path}.')
    if args.dry_run:
        say(f'next: {command("train")} {shlex.quote(str(path))}')
        return
    args.config, args.work_dir, args.epochs = str(path), str(plan.work_dir), None
    trained = train(args)
    if not args.check_only:
        show(trained, plan, _split_options(args))


def _is_data(name: str) -> bool:
    """Whether it is a folder of images; one of configs alone is none."""
    path = Path(name)
    return path.is_dir() and not (any(path.glob('*.py')) and not any(path.glob('*/*')))


def say(line: str) -> None:
    """Print from the first process only."""
    if is_first():
        print(printable(line), flush=True)


# --- before


def make_plan(args: argparse.Namespace, typed: Sequence[str] = ()) -> Plan:
    """Read the folder, and decide.

    Args:
        args: Of the command line.
        typed: Its words, for the heading of the config.

    Raises:
        DataError: The folder cannot be used.
        ValueError: An option does not fit.
    """
    folder = read_folder(args.config, args.format)
    if args.classes:
        _choose_classes(folder, [name.strip() for name in args.classes.split(',')])
    splits = _splits(folder, args)
    head = _head(folder, args.head)
    network = args.model or MODEL
    _describe(folder, splits)
    weights = _weights(args.pretrained, network, head, args.lite)
    scratch = weights.checkpoint is None
    for name in ('size', 'batch_size'):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f'--{name.replace("_", "-")} {value} must be at least 1.')
    if args.size and args.size % 32:
        raise UserError(
            f'--size {args.size} must be a multiple of 32; {round(args.size / 32) * 32} is near.'
        )
    if args.lr is not None and not args.lr > 0:
        raise UserError(f'--lr {args.lr:g} must be above 0.')
    chosen = choose(
        head, network, splits['train'], scratch, args.size, args.batch_size, args.epochs, args.lr
    )
    _say_costs(head, network, len(folder.classes), args.lite, int(chosen.size.value))
    say(
        f'{HEADS[head].title} on {network}, '
        f'{"from random weights" if scratch else f"from {weights.checkpoint}"}: images of '
        f'{chosen.size.value}, {chosen.batch.value} per step, {chosen.epochs.value} epochs, '
        f'learning rate {chosen.lr.value:g}.'
    )
    asked = args.work_dir or str(Path('work_dirs', _run_name(folder, network, args)))
    work_dir = free_folder(asked)  # a config that is there may have been changed
    if work_dir != Path(asked):
        say(f'{asked} contains another run, so this one writes to {work_dir}.')
    line = ' '.join(['repnext-mm train', *map(shlex.quote, typed)])
    return Plan(folder, head, network, args.lite, weights, chosen, splits, work_dir, line)


def _run_name(folder: LabeledFolder, network: str, args: argparse.Namespace) -> str:
    stem = re.sub(r'[^\w-]+', '_', folder.root.resolve().name).strip('_') or 'data'
    parts = [stem, args.head or '', network, 'lite' if args.lite else '']
    return '_'.join(part for part in parts if part)


def _choose_classes(folder: LabeledFolder, names: Sequence[str]) -> None:
    if folder.kind in ('masks', 'classes'):
        raise UserError('--classes is for objects; label maps and class folders say all of them.')
    for name in names:
        if name not in folder.classes:
            close = closest(name, folder.classes)
            known = ', '.join(folder.classes)
            hint = f'did you mean {close!r}?' if close else f'there are {known}.'
            raise UserError(f'--classes: there is no class {name!r}; {hint}')
    place = {folder.classes.index(name): label for label, name in enumerate(names)}
    for example in folder.examples():
        example.objects = [item for item in example.objects if item.label in place]
        for item in example.objects:
            item.label = place[item.label]
    folder.classes = tuple(names)


def _splits(folder: LabeledFolder, args: argparse.Namespace) -> dict[str, list[Example]]:
    splits = dict(folder.splits)
    if 'train' not in splits:
        raise DataError(
            f'{folder.root} has no images to train with, only {" and ".join(splits)}; rename one.'
        )
    share = VAL_SHARE if args.val_share is None else args.val_share
    if not 0 <= share < 1:
        raise UserError(f'--val-share {share:g} must be from 0 to below 1.')
    if 'val' in splits:
        if args.val_share is not None or args.group_by:
            raise UserError(
                f'{folder.root} has a split for validation; --val-share and --group-by are for '
                'data without one.'
            )
        return {name: splits[name] for name in ('train', 'val', 'test') if name in splits}
    train_part, val = split_examples(splits['train'], share, args.group_by)
    if share:
        folder.notes.append(
            f'There is no split for validation: {len(val)} images are set aside, the same ones '
            'each time.'
        )
    else:
        folder.notes.append('Validation is on the training images, which says little of others.')
    return {'train': train_part, 'val': val, **{k: v for k, v in splits.items() if k == 'test'}}


def _head(folder: LabeledFolder, asked: str | None) -> str:
    if asked is None:
        return CHOICE[folder.kind]
    if folder.kind not in HEADS[asked].kinds:
        what = {
            'boxes': 'boxes without outlines', 'polygons': 'objects', 'masks': 'label maps',
            'classes': 'one class per image',
        }  # fmt: skip
        fitting = [name for name, head in HEADS.items() if folder.kind in head.kinds]
        raise UserError(
            f'--head {asked} cannot be trained from {what[folder.kind]}, which {folder.root} has; '
            f'choose {", ".join(fitting)}.'
        )
    return asked


def _describe(folder: LabeledFolder, splits: dict[str, list[Example]]) -> None:
    names = ', '.join(folder.classes[:8]) + (' ...' if len(folder.classes) > 8 else '')
    counts = ', '.join(f'{len(found)} {split}' for split, found in splits.items())
    what = {
        'boxes': 'boxes', 'polygons': 'objects with outlines', 'masks': 'label maps',
        'classes': 'labels',
    }[folder.kind]  # fmt: skip
    if folder.kind in ('boxes', 'polygons'):
        what = f'{sum(len(e.objects) for part in splits.values() for e in part)} {what}'
    say(f'{folder.root}: {folder.format}, {what}; images: {counts}; classes: {names}.')
    for note in folder.notes:
        say(f'note: {note}')
    if folder.kind in ('boxes', 'polygons'):
        seen = Counter(item.label for e in splits['train'] for item in e.objects)
        if missing := [n for i, n in enumerate(folder.classes) if not seen[i]]:
            say(
                f'note: {len(missing)} of {len(folder.classes)} classes have no object to train '
                f'with: {", ".join(missing[:5])}{" ..." if len(missing) > 5 else ""}.'
            )


def _weights(asked: str | None, network: str, head: str, lite: bool) -> Weights:
    from ..backbones import look_up

    family, arch = look_up(network)
    names = names_for(family.__name__, arch, fused=False)
    whole = f'{network}_{WHOLE.get(head)}'
    if asked == 'none':
        return Weights()
    if asked is None and not lite and whole in PUBLISHED:
        return Weights(whole, whole=True)
    if asked in (None, 'imagenet'):
        found = next((n for n in names if 'distill' in n or 'in1k' in n or 'sail' in n), None)
        if found is None:
            if asked is not None:
                raise UserError(f'no weights of {network} are published; give --pretrained none.')
            say(f'note: no weights of {network} are published; training starts from random ones.')
            return Weights()
        return Weights(found)
    if head == 'classifier':
        raise UserError('--pretrained of a classifier is none or imagenet.')
    return Weights(asked, whole=_is_whole(asked))


def _is_whole(checkpoint: str) -> bool:
    """Whether a checkpoint has more than a backbone in it."""
    from ..checkpoints import CheckpointError, read_run

    try:
        content = read_run(checkpoint).content
    except CheckpointError as error:
        if Path(checkpoint).exists() or checkpoint in PUBLISHED:
            return False  # weights of a backbone in another container
        raise UserError(f'--pretrained {checkpoint}: {error}') from error
    state = content.get('state_dict') or {}
    return any(key.startswith(('neck.', 'bbox_head.', 'decode_head.')) for key in state)


def _say_costs(head: str, network: str, classes: int, lite: bool, side: int) -> None:
    """Parameters and multiplications, with the other form beside."""
    if head == 'classifier':
        return
    texts = []
    for light in (lite, not lite):
        try:
            model = build_model_config(head, network, classes, light)
        except ValueError:
            if light == lite:
                raise
            continue
        parameters, macs = cost(model, HEADS[head].scope, (side, side))
        texts.append(f'{parameters / 1e6:.1f} M parameters, {macs / 1e9:.1f} GMACs')
    other = f' ({texts[1]} {"without" if lite else "with"} --lite)' if len(texts) > 1 else ''
    say(f'{HEADS[head].title}: {texts[0]} at {side} x {side}{other}.')


# --- after


def _split_options(args: argparse.Namespace) -> str:
    """What was said of the splits, for a command that reads the folder again."""
    share = '' if args.val_share is None else f' --val-share {args.val_share:g}'
    return share + (f' --group-by {shlex.quote(args.group_by)}' if args.group_by else '')


def show(trained: Trained, plan: Plan, split_options: str = '') -> None:
    """Print what was reached, draw curves and predictions, and name the next commands."""
    from rich.console import Console
    from rich.table import Table

    from ..visualization import plot_curves, read_scalars
    from ..visualization.trained import draw_predictions

    folder = trained.work_dir
    checkpoint = trained.best or trained.last
    if checkpoint is None:
        return
    monitor = HEADS[plan.head].monitor
    evaluations = [record for _, record in read_scalars(folder).val if monitor in record]
    if evaluations:
        best = max(evaluations, key=lambda record: record[monitor])
        metrics = known_metrics(best)
        table = Table('', *metrics)
        table.add_row(f'best, epoch {best["step"]}', *(f'{v:.1f}' for v in metrics.values()))
        Console().print(table)
    curves = plot_curves(folder, folder / 'curves.png')
    pictures = draw_predictions(checkpoint, trained.cfg, folder / 'predictions.png', PICTURED)
    say(f'Curves: {curves}')
    say(f'Predictions beside the truth: {pictures}')
    say(f'Best checkpoint: {checkpoint}')
    quoted = shlex.quote(str(checkpoint))
    data = shlex.quote(str(plan.folder.root))
    say(f'next: {command("predict")} {quoted} {data} --out predictions')
    say(f'      {command("look")} {quoted} {data}{split_options}')
