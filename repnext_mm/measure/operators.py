"""Where PyTorch spends its time, by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def by_operator(
    function: Callable[[], Any], runs: int = 3, device: str = 'cpu', shapes: bool = False
) -> list[dict[str, Any]]:
    """Own time of every operator in one run of `function`, the longest first.

    Each is a dict of `operator`, `ms`, `share` (of all own times) and `calls`; on a GPU, the time
    is that of its kernels. With `shapes`, calls with other input shapes are other entries, and
    each has its `shapes`.
    """
    activities = [ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    function()
    with profile(activities=activities, acc_events=True, record_shapes=shapes) as profiler:
        for _ in range(runs):
            function()
        if device == 'cuda':
            torch.cuda.synchronize()
    own = 'self_device_time_total' if device == 'cuda' else 'self_cpu_time_total'
    events = [e for e in profiler.key_averages(group_by_input_shape=shapes) if getattr(e, own)]
    total = sum(getattr(e, own) for e in events) or 1.0
    table = [
        {
            'operator': e.key,
            'ms': getattr(e, own) / 1e3 / runs,
            'share': getattr(e, own) / total,
            'calls': e.count / runs,
            **({'shapes': e.input_shapes} if shapes else {}),
        }
        for e in events
    ]
    return sorted(table, key=lambda entry: -entry['ms'])
