"""What a figure depends on besides the code: the machine, its load, and the versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: Instruction sets that choose the kernels of torch, ONNX Runtime and OpenVINO.
ISA_FLAGS = (
    *('avx2', 'fma', 'f16c', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'avx_vnni'),
    *('amx_bf16', 'amx_int8', 'asimd', 'asimddp', 'fphp', 'i8mm', 'bf16', 'sve'),
)
#: Above this load per core, figures are no headline.
MAX_LOAD = 0.5
#: What others may use of each core while we measure, where the kernel reports it.
MAX_OTHERS = 0.1
#: Distributions by what they are called here; the two stacks name theirs differently.
PACKAGES: dict[str, tuple[str, ...]] = {
    'torch': ('torch',),
    'mmengine': ('mmengine', 'onedl-mmengine', 'mmengine-lite'),
    'timm': ('timm',),
    'numpy': ('numpy',),
}


def describe(packages: Sequence[str] = ()) -> dict[str, Any]:
    """The environment as JSON values; `packages` are reported besides torch, mmengine and timm.

    What the system does not report (a clock governor inside a virtual machine) is None.
    """
    return {
        'cpu': cpu_model(),
        'architecture': platform.machine(),
        'isa': isa_flags(),
        'torch_isa': torch.backends.cpu.get_cpu_capability(),
        'governor': _read('/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor'),
        'cores': len(cores()),
        'threads': torch.get_num_threads(),
        'load_average': load_average(),
        'system': f'{platform.system()} {platform.release()}',
        'python': platform.python_version(),
        'versions': versions((*PACKAGES, *packages)),
        'gpu': gpu(),
    }


def summary(environment: dict[str, Any]) -> str:
    """The same in one line for people."""
    gpu = environment['gpu']
    device = f'{gpu["name"]}, driver {gpu["driver"]}; ' if gpu else ''
    packages = ', '.join(f'{k} {v}' for k, v in environment['versions'].items() if v)
    return (
        f'{device}{environment["cpu"]} ({" ".join(environment["isa"])}), '
        f'{environment["threads"]} threads on {environment["cores"]} cores; {packages}'
    )


def cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_model() -> str:
    for line in (_read('/proc/cpuinfo') or '').splitlines():
        key, _, value = line.partition(':')
        if key.strip() in ('model name', 'Model'):
            return value.strip()
    return platform.processor() or platform.machine()


def isa_flags() -> list[str]:
    """Those of `ISA_FLAGS` that this CPU has."""
    for line in (_read('/proc/cpuinfo') or '').splitlines():
        key, _, value = line.partition(':')
        if key.strip() in ('flags', 'Features'):
            return [flag for flag in ISA_FLAGS if flag in value.split()]
    return []


def load_average() -> float | None:
    """Processes that were ready to run, averaged over the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # Windows has no such function
        return None


def require_device(device: str) -> None:
    """See that a device can be measured on.

    Raises:
        ValueError: It is 'cuda', and there is no GPU.
    """
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('device=cuda is asked for, but torch sees no GPU; use cpu.')


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed versions by name; None for what is not installed."""
    return {name: _version(PACKAGES.get(name, (name,))) for name in packages}


def _version(distributions: Sequence[str]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def gpu() -> dict[str, Any] | None:
    """Name, memory, and versions of driver and CUDA of the first GPU that torch sees."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        'name': properties.name,
        'memory_bytes': properties.total_memory,
        'capability': f'{properties.major}.{properties.minor}',
        'cuda': torch.version.cuda,
        'cudnn': torch.backends.cudnn.version(),
        'driver': _driver(),
    }


def _driver() -> str | None:
    program = shutil.which('nvidia-smi')
    if not program:
        return None
    query = [program, '--query-gpu=driver_version', '--format=csv,noheader']
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


class LoadWatch:
    """Says whether the machine was quiet enough between its making and `report`.

    The load average lags by a minute and counts ourselves. Where the kernel reports it (Linux),
    what others used of the cores while we measured decides instead.
    """

    def __init__(self) -> None:
        self.load_average = load_average()
        self.start = time.perf_counter()
        self.busy = _busy_seconds()
        self.own = _own_seconds()

    def report(self) -> dict[str, Any]:
        """`headline` (bool), `reason` against it or None, and the figures behind it."""
        count = os.cpu_count() or 1
        load = None if self.load_average is None else round(self.load_average / count, 2)
        others = self._others(count)
        reason = None
        if others is not None and others > MAX_OTHERS:
            share = f'{others:.0%} of every core (limit {MAX_OTHERS:.0%})'
            reason = f'other processes used {share} meanwhile'
        elif others is None and load is not None and load > MAX_LOAD:
            reason = f'the load was {load} per core at the start (limit {MAX_LOAD})'
        return {
            'load_per_core': load,
            'others_per_core': others,
            'headline': reason is None,
            'reason': reason,
        }

    def _others(self, count: int) -> float | None:
        busy, own = _busy_seconds(), _own_seconds()
        if None in (busy, own, self.busy, self.own):
            return None
        assert busy is not None and self.busy is not None  # which mypy does not see above
        assert own is not None and self.own is not None
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        # Both counters tick in 10 ms.
        return round(max(busy - self.busy - (own - self.own), 0.0) / elapsed / count, 3)


def _ticks() -> int:
    return os.sysconf('SC_CLK_TCK')


def _busy_seconds() -> float | None:
    """Core seconds that were used on this machine since it started, by anybody."""
    stat = _read('/proc/stat')
    if stat is None:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _ticks()


def _own_seconds() -> float | None:
    """Core seconds of this process and all that it started."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        stat = _read(str(path))
        if stat is None:  # it has ended
            continue
        # The name, in parentheses, may hold anything.
        fields = stat.rpartition(')')[2].split()
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        used[pid] = sum(map(int, fields[11:15]))  # its own and its ended children's
    if os.getpid() not in used:
        return None
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(used[pid] for pid in ours) / _ticks()
