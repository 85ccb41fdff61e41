"""Image folders of a classifier: the class of an image is the folder that it is in."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmengine.config import Config
from PIL import Image

from ...files import require_regular
from ...program import command
from ..errors import UserError
from .findings import Finding, error, some, warning

#: Seconds for decoding images of one data set.
SECONDS = 5.0
SAMPLE = 'repnext_m0_shapes'
TYPE = 'TimmDataset'


@dataclass(frozen=True)
class Listing:
    """What a folder, or the tar file in its place, contains.

    Args:
        path: The folder or the file.
        images: The images of each class, by name of the folder.
        loose: Images in no class folder.
    """

    path: Path
    images: Mapping[str, Sequence[str]]
    loose: Sequence[str]

    @property
    def filled(self) -> list[str]:
        """Folders with images."""
        return [name for name, images in self.images.items() if images]


def check_class_folders(cfg: Config, splits: Sequence[str]) -> Iterator[Finding]:
    """Look into the image folders that the data sets of `splits` name.

    Raises:
        UserError: A folder does not exist, or has no class folders.
    """
    listings: dict[str, Listing] = {}
    named = False
    for split in splits:
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
        root = dataset.get('root')
        if dataset.get('type') != TYPE or dataset.get('name') or root is None:
            continue
        listing = _list(Path(root), split)
        chosen = (dataset.get('metainfo') or {}).get('classes')
        # What train says of the model, val would say again.
        yield from _check_classes(listing, chosen, {} if listings else cfg.model)
        yield from _check_images(listing)
        listings[split] = listing
        if chosen is not None:
            named = True
    if not named:
        yield from _compare([*listings.items()])


def _list(root: Path, split: str) -> Listing:
    from timm.data.readers.img_extensions import get_img_extensions

    endings = tuple(get_img_extensions())
    archive = root.with_name(f'{root.name}.tar')
    if not root.exists() and archive.is_file():
        root = archive
    if not root.exists():
        raise UserError(
            f'no {split} images at {root} (looked in {root.absolute()}); {_layout(root)}, or '
            f'point elsewhere with --cfg-options data_root=DIR, or try the generated sample set: '
            f'{command("train")} {SAMPLE}'
        )
    images: dict[str, list[str]] = {}
    loose: list[str] = []
    for folder, name in _members(root):
        # timm names a class by the last folder on the way to an image.
        found = images.setdefault(folder.rpartition('/')[2], []) if folder else loose
        if name.lower().endswith(endings):
            found.append(f'{folder}/{name}' if folder else name)
    if not any(images.values()):
        what = f'{len(loose)} images in no class folder' if loose else 'no image'
        raise UserError(f'{root} contains {what}; {_layout(root)}.')
    return Listing(root, images, loose)


def _layout(root: Path) -> str:
    parent = root.parent
    return (
        f'expected under {parent}: train/CLASS/IMAGE.JPEG and val/CLASS/IMAGE.JPEG with the same '
        'class folders, or train.tar and val.tar of such folders'
    )


def _members(root: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of every file; a folder without files comes with the name ''."""
    if root.is_file():
        try:
            with tarfile.open(root) as archive:
                for member in archive:
                    folder, _, name = member.name.removeprefix('./').rpartition('/')
                    if member.isdir():
                        yield member.name.removeprefix('./'), ''
                    elif member.isfile():
                        yield folder, name
        except (tarfile.TarError, OSError) as reason:
            raise UserError(f'{root} cannot be read as a tar file: {reason}.') from reason
        return
    # As timm walks, which needs no look at each of a million files.
    for place, inner, files in os.walk(root, followlinks=True):
        folder = Path(place).relative_to(root).as_posix()
        folder = '' if folder == '.' else folder
        yield from ((folder, name) for name in files)
        if folder and not (files or inner):
            yield folder, ''


def _check_classes(
    listing: Listing, chosen: Sequence[str] | None, model: Mapping[str, Any]
) -> Iterator[Finding]:
    root = listing.path
    if listing.loose:
        yield warning(
            f'{root} has {len(listing.loose)} images outside of class folders, the first is '
            f'{listing.loose[0]}; timm gives them a class of their own: move them into folders.'
        )
    empty = [name for name, images in listing.images.items() if not images]
    if chosen is not None:
        if missing := [name for name in chosen if name not in listing.filled]:
            yield warning(f'{root} has no images of {len(missing)} classes: {some(missing)}.')
        if left := [name for name in listing.filled if name not in chosen]:
            yield warning(
                f'{root} has {len(left)} folders that metainfo classes does not name, whose images '
                f'are not used: {some(left)}.'
            )
    elif empty:
        yield error(
            f'{root} has {len(empty)} class folders without an image ({some(empty)}), and every '
            'label after them would move; fill or remove them.'
        )
    classes = len(chosen) if chosen is not None else len(listing.filled)
    given = model.get('num_classes', 1000)
    if classes != given and model.get('type') == 'TimmClassifier':
        yield error(
            f'model.num_classes is {given}, and {root} has {classes} class folders '
            f'({some(chosen or listing.filled)}); add --cfg-options model.num_classes={classes}'
        )


def _check_images(listing: Listing) -> Iterator[Finding]:
    """Decode images from all over, as many as `SECONDS` allow."""
    names = [name for images in listing.images.values() for name in images]
    start, read, bad = time.monotonic(), 0, []
    step = max(len(names) // 2000, 1)
    archive = tarfile.open(listing.path) if listing.path.is_file() else None  # noqa: SIM115
    try:
        for name in names[::step]:
            if time.monotonic() - start > SECONDS:
                break
            read += 1
            if reason := _fault(listing.path, name, archive):
                bad.append((name, reason))
    finally:
        if archive is not None:
            archive.close()
    if bad:
        name, reason = bad[0]
        yield error(
            f'{len(bad)} of the {read} images of {listing.path} that were read are broken, the '
            f'first is {name} ({reason}); remove or replace them.'
        )


def _fault(root: Path, name: str, archive: tarfile.TarFile | None) -> str:
    """What is wrong with an image; '' for nothing."""
    try:
        if archive is None:
            data = require_regular(root / name).read_bytes()
        else:
            member = archive.extractfile(_member(archive, name))
            data = member.read() if member else b''
        with Image.open(io.BytesIO(data)) as image:
            image.convert('RGB')
    except Exception as reason:  # Pillow's plugins raise anything
        return ' '.join(str(reason).split())[:120] or type(reason).__name__
    return ''


def _member(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    try:
        return archive.getmember(name)
    except KeyError:
        return archive.getmember(f'./{name}')


def _compare(listings: Sequence[tuple[str, Listing]]) -> Iterator[Finding]:
    """The folders of all splits have the same names: they are the labels."""
    for (first, one), (split, other) in pairwise(listings):
        extra = sorted(set(other.filled) - set(one.filled))
        missing = sorted(set(one.filled) - set(other.filled))
        if extra or missing:
            parts = [f'only {split}: {some(extra)}'] if extra else []
            parts += [f'only {first}: {some(missing)}'] if missing else []
            yield error(
                f'{one.path} has {len(one.filled)} class folders and {other.path} '
                f'{len(other.filled)}, which differ ({"; ".join(parts)}), and folders are the '
                'labels in their order; give both the same folders, or name the classes by '
                'metainfo=dict(classes=(...)) in every data set.'
            )
