"""Whether an artifact computes what the network computes: per output, against float64 PyTorch."""

from __future__ import annotations

import copy
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import require_regular
from ..runtimes import Artifact

#: Of the arrays to compare on: a batch of 8 in 1344x800 takes 0.6 GB.
MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class Tolerance:
    """What an output must keep to; one of the two is given.

    Args:
        max_rel: Largest difference relative to the standard deviation of the expected output.
        sqnr_db: Ratio of the energies of signal and difference, in dB.
    """

    max_rel: float = math.inf
    sqnr_db: float = -math.inf

    def __str__(self) -> str:
        if self.max_rel < math.inf:
            return f'max rel err <= {self.max_rel:g}'
        return f'SQNR >= {self.sqnr_db:g} dB'


#: By the numbers that an artifact computes in. Rounding to the 11 significant bits of float16 and
#: the 8 of bfloat16 leaves about 50 and 33 dB in networks as deep as these.
TOLERANCES = {
    'fp32': Tolerance(max_rel=1e-4),
    'fp16': Tolerance(sqnr_db=35.0),
    'bf16': Tolerance(sqnr_db=20.0),
    'int8': Tolerance(sqnr_db=15.0),
}


@dataclass(frozen=True)
class OutputParity:
    """How far one output of one artifact is from the network's."""

    output: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    sqnr_db: float
    passed: bool

    def as_record(self) -> dict[str, Any]:
        """As it is in report.json."""
        record = asdict(self)
        record['pass'] = record.pop('passed')
        return record | {'shape': list(self.shape)}


@dataclass(frozen=True)
class Golden:
    """Images and what the network makes of them in float64.

    Args:
        image: `(N, 3, H, W)` float32.
        outputs: `(N, C_i, H_i, W_i)` float64, by name.
    """

    image: np.ndarray
    outputs: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        with open(path, 'wb') as file:
            np.savez_compressed(file, image=self.image, **self.outputs)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read what `save` wrote.

        Raises:
            ValueError: It is not that, or asks for more memory than `MOST_BYTES`.
        """
        _require_arrays(path)
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = dict(data)
            return cls(arrays.pop('image'), arrays)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f'{path} has no images to compare on ({error}).') from error


def _require_arrays(path: Path) -> None:
    """Each array of the archive has as many bytes as its header says, and all fit into memory."""
    try:
        with zipfile.ZipFile(require_regular(path)) as archive:
            total = 0
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, _, dtype = read(file)
                    claimed = math.prod(shape) * dtype.itemsize
                    total += claimed
                    if claimed > entry.file_size or dtype.hasobject:
                        raise ValueError(f'{entry.filename} claims {claimed} bytes')
            if total > MOST_BYTES:
                raise ValueError(f'it unpacks to {total} bytes, and at most {MOST_BYTES} are read')
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} cannot be read as arrays: {error}.') from error


@torch.no_grad()
def golden(model: nn.Module, image: Tensor, names: Sequence[str]) -> Golden:
    """Run the network in float64; `model` itself is not changed."""
    exact = copy.deepcopy(model).double()
    outputs = exact(image.double())
    return Golden(
        image.numpy(), {name: out.numpy() for name, out in zip(names, outputs, strict=True)}
    )


def compare(
    actual: Sequence[np.ndarray], expected: Golden, tolerance: Tolerance
) -> list[OutputParity]:
    """Compare an artifact's outputs, in their order, with the expected ones.

    An output of another shape, or a missing one, or one with NaN does not pass.
    """
    rows = []
    for i, (name, want) in enumerate(expected.outputs.items()):
        got = actual[i] if i < len(actual) else np.empty(0)
        max_abs = max_rel = math.inf
        sqnr_db = -math.inf
        if got.shape == want.shape and np.isfinite(got).all():
            error = got.astype(np.float64) - want
            max_abs = float(np.abs(error).max())
            max_rel = max_abs / max(float(want.std()), 1e-12)
            # 300 dB is more than float64 can resolve.
            energy = float((error**2).sum()) / max(float((want**2).sum()), 1e-30)
            sqnr_db = -10 * math.log10(max(energy, 1e-30))
        rows.append(
            OutputParity(
                name,
                want.shape,
                max_abs,
                max_rel,
                sqnr_db,
                max_rel <= tolerance.max_rel and sqnr_db >= tolerance.sqnr_db,
            )
        )
    return rows


def check_artifact(
    artifact: Artifact, goldens: Sequence[Golden], tolerance: Tolerance
) -> list[OutputParity]:
    """Run an opened artifact on every golden image and compare.

    Raises:
        ArtifactError: Its runtime fails.
    """
    return [row for item in goldens for row in compare(artifact.run(item.image), item, tolerance)]


def other_shapes(
    shape: tuple[int, int, int, int], dynamic: str, stride: int
) -> list[tuple[int, int, int, int]]:
    """Shapes besides the one exported at that an artifact with open dimensions must accept.

    Of heights and widths, one is odd and smaller, and one odd and larger.
    """
    batch, channels, height, width = shape
    if dynamic == 'batch':
        return [(batch + 2, channels, height, width)]
    if dynamic == 'hw':
        larger = (height + stride - 3, width + 2 * stride + 1)
        smaller = (max(height // 2 + 1, stride + 1), max(width - stride // 2 + 5, stride + 1))
        return [(batch, channels, *larger), (batch, channels, *smaller)]
    return []
