"""Where a run computes: on a GPU if there is one, else on the CPU, in one or several processes."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from .allocator import VARIABLE, keep_freed_memory
from .amp import fit_amp_to_cpu
from .errors import UserError

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


@MODEL_WRAPPERS.register_module(force=True)  # replaces its stand-in of `lazy`
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's data-parallel wrapper without device ids and SyncBN, which need a GPU.

    Each process normalises by its own batch; the running statistics are those of the first.
    """

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        super().__init__(revert_sync_batchnorm(module), device_ids=None, **kwargs)


def choose_device(cfg: Config, device: str, launcher: str) -> str | None:
    """Check that `cfg` can run where it was asked to, and adapt it to a CPU where it cannot.

    Args:
        cfg: Changed in place.
        device: 'auto' uses the CPU if there is no GPU, 'cuda' refuses to.
        launcher: As in MMEngine: 'none', 'pytorch', 'slurm' or 'mpi'.

    Returns:
        A line for the user that names what changed, or None.

    Raises:
        UserError: A GPU is asked for and there is none, or one process has none to itself.
    """
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise UserError(
            '--launcher pytorch needs the processes that torchrun starts: run `torchrun '
            '--nproc-per-node=N -m repnext_mm_cli train CONFIG --launcher pytorch` (or test), or '
            'tools/dist_train.sh CONFIG N (or dist_test.sh CONFIG CHECKPOINT N).'
        )
    if get_device() != 'cpu':
        if get_device() == 'cuda' and launcher == 'pytorch':
            _check_gpu_count()
        return None
    if device == 'cuda':
        raise UserError(
            f'--device cuda was given, but {why_no_cuda()}; leave it out to run on the CPU.'
        )
    if launcher in ('slurm', 'mpi'):
        raise UserError(
            f'--launcher {launcher} needs GPUs, but {why_no_cuda()}; on CPUs use '
            '--launcher pytorch.'
        )
    return _fall_back_to_cpu(cfg, launcher)


def why_no_cuda() -> str:
    """Why torch finds no CUDA GPU."""
    if not torch.backends.cuda.is_built():
        return f'torch {torch.__version__} is built without CUDA'
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return f'torch finds no GPU (CUDA_VISIBLE_DEVICES is {visible!r})'
    return 'torch finds no GPU on this machine (is the driver there? see nvidia-smi)'


def _check_gpu_count() -> None:
    gpus, processes = torch.cuda.device_count(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if processes > gpus:
        raise UserError(
            f'{processes} processes were asked for, but torch sees {gpus} GPU(s) on this machine; '
            f'give N = {gpus} to tools/dist_train.sh.'
        )


def _fall_back_to_cpu(cfg: Config, launcher: str) -> str:
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if launcher == 'pytorch' else 1
    workers = _limit_workers(cfg, processes)
    changes = ['SyncBN as BatchNorm', f'{workers} data worker{"s" if workers != 1 else ""}']
    if 'env_cfg' in cfg:
        cfg.env_cfg.cudnn_benchmark = False
    wrapper = cfg.get('optim_wrapper')
    if wrapper is not None and (precision := fit_amp_to_cpu(wrapper)):
        changes.append(precision)
    if keep_freed_memory():
        changes.append(f'freed memory kept for the next step ({VARIABLE}=0 returns it)')
    if launcher == 'pytorch':
        # mmengine's own start would call torch.cuda.set_device.
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        given = cfg.get('model_wrapper_cfg') or {}
        cfg.model_wrapper_cfg = dict(
            type='CPUDistributedDataParallel',
            find_unused_parameters=given.get(
                'find_unused_parameters', cfg.get('find_unused_parameters', False)
            ),
        )
        changes.append(f'{torch.distributed.get_world_size()} processes over gloo')
    return f'No GPU ({why_no_cuda()}): running on the CPU with {", ".join(changes)}.'


def _limit_workers(cfg: Config, processes: int) -> int:
    """Leave each process a core to compute on; the others may read data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    most = max(0, (cores or 1) // processes - 1)
    used = 0
    for key in LOADERS:
        loader = cfg.get(key)
        if loader is None:
            continue
        loader.num_workers = min(loader.get('num_workers', 0), most)
        loader.pin_memory = False
        if loader.num_workers == 0:
            loader.persistent_workers = False
            for option in ('prefetch_factor', 'timeout'):
                loader.pop(option, None)
        used = max(used, loader.num_workers)
    return used
