"""Where PyTorch spends its time, by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def by_operator(
    function: Callable[[], Any], runs: int = 3, device: str = 'cpu'
) -> list[dict[str, Any]]:
    """Own time of every operator in one run of `function`, the longest first.

    Each is a dict of `operator`, `ms`, `share` (of all own times) and `calls`; on a GPU, the time
    is that of its kernels.
    """
    activities = [ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    function()
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(runs):
            function()
        if device == 'cuda':
            torch.cuda.synchronize()
    own = 'self_device_time_total' if device == 'cuda' else 'self_cpu_time_total'
    events = [
        (e.key, getattr(e, own) / 1e3 / runs, e.count / runs) for e in profiler.key_averages()
    ]
    total = sum(ms for _, ms, _ in events) or 1.0
    table = [
        {'operator': name, 'ms': ms, 'share': ms / total, 'calls': calls}
        for name, ms, calls in events
        if ms
    ]
    return sorted(table, key=lambda entry: -entry['ms'])
