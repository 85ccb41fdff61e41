"""Exporting a backbone to one file, without the checks and the report around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repnext_mm.backbones import PyramidBackbone
from repnext_mm.deploy.formats import FORMATS
from repnext_mm.deploy.job import Job
from repnext_mm.deploy.targets import BackboneTarget
from repnext_mm.engine.quiet import muffled

#: What the name of a file says of its format; the first that fits.
SUFFIXES = {
    '.aoti.pt2': 'aoti',
    '_openvino': 'openvino',
    **{row.suffix: name for name, row in FORMATS.items()},
}


def job(
    backbone: PyramidBackbone, size: tuple[int, int], metadata: dict[str, Any], **options: Any
) -> Job:
    """What exports a fused backbone."""
    return Job(BackboneTarget(backbone), size, metadata, **options)


def write(job: Job, path: Path) -> None:
    """Export to a file; its name chooses the format."""
    name = next(name for suffix, name in SUFFIXES.items() if path.name.endswith(suffix))
    with muffled():
        FORMATS[name].export(job, path)
