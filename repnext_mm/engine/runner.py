"""mmengine's runner, as the tools use it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..files import name_file, write_text
from .atomic_checkpoint import AtomicCheckpointHook
from .preflight import Sources
from .quiet import quiet_log
from .schedule import name_of

#: Where these are set, files go elsewhere than to the local disk.
ELSEWHERE = ('out_dir', 'backend_args', 'file_client_args')


class AtomicLoggerHook(LoggerHook):
    """mmengine's LoggerHook; the metrics of a test are in their file completely or not at all."""

    json_log_path: str | None

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write the metrics into a temporary folder beside their file, and move them."""
        name = str(self.json_log_path)
        with tempfile.TemporaryDirectory(dir=runner.log_dir, prefix='metrics.') as folder:
            self.json_log_path = str(Path(Path(folder).name, name))
            try:
                super().after_test_epoch(runner, metrics)
                os.replace(Path(folder, name), Path(runner.log_dir, name))
            except OSError as error:
                name_file(error, Path(runner.log_dir, name), len(json.dumps(metrics, default=str)))
                raise
            finally:
                self.json_log_path = name


#: mmengine's hooks, and the same ones with whole files.
WHOLE_FILES: dict[str, type[Hook]] = {
    'CheckpointHook': AtomicCheckpointHook,
    'LoggerHook': AtomicLoggerHook,
}


class ToolRunner(Runner):
    """mmengine's runner, with what the tools promise.

    What nobody can act on is in its log file and not on the screen, a log folder belongs to one
    run, files are whole, and accumulated gradients count as the batch that they are.
    """

    _timestamp: str
    #: Completed annotation files, which data sets and evaluators read.
    sources = Sources()

    @property
    def dumped_config(self) -> Path:
        """Where the config is, with all that the command line changed: beside the checkpoints.

        A config that is there itself is not replaced: it goes into the log folder.
        """
        path = Path(self.work_dir, _config_name(self))
        given = self.cfg.filename
        if given and path.exists() and path.samefile(given):
            return Path(self.log_dir, path.name)
        return path

    def setup_env(self, env_cfg: dict) -> None:
        """As mmengine's, and claim a log folder, which mmengine names by the second."""
        super().setup_env(env_cfg)
        second = self._timestamp
        stamp = [second]
        if is_main_process():
            number = 1
            while not _made(Path(self.work_dir, stamp[0])):
                number += 1
                stamp[0] = f'{second}_{number}'
        broadcast_object_list(stamp)
        self._timestamp = stamp[0]

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """As mmengine's, before the environment and the config are logged."""
        logger = super().build_logger(*args, **kwargs)
        quiet_log(logger)
        return logger

    def register_hook(self, hook: Hook | dict, priority: Any = None) -> None:
        """As mmengine's, with hooks that write whole files in the place of mmengine's own."""
        if (
            isinstance(hook, Mapping)
            and name_of(hook) in WHOLE_FILES
            and not any(hook.get(key) for key in ELSEWHERE)
        ):
            hook = {**hook, 'type': WHOLE_FILES[name_of(hook)]}
        super().register_hook(hook, priority)

    def dump_config(self) -> None:
        """Nothing yet: a run that does not start replaces no config."""

    def load_or_resume(self) -> None:
        """As mmengine's, and then write `dumped_config`."""
        super().load_or_resume()
        if is_main_process():
            write_text(self.dumped_config, self.cfg.dump())

    def build_dataloader(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As mmengine's, with completed annotation files in place of those of the config."""
        return super().build_dataloader(self.sources.apply(dataloader), *args, **kwargs)

    def build_evaluator(self, evaluator: Any) -> Any:
        """As mmengine's, with completed annotation files in place of those of the config."""
        return super().build_evaluator(self.sources.apply(evaluator))

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """As mmengine's, which leaves out that the gradients of several batches may accumulate."""
        if auto_scale_lr and auto_scale_lr.get('enable'):
            base = auto_scale_lr['base_batch_size'] / accumulated(self.cfg)
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': base}
        super().scale_lr(optim_wrapper, auto_scale_lr)


class EvaluationRunner(ToolRunner):
    """The runner of a test, which writes nothing beside the checkpoints."""

    @property
    def dumped_config(self) -> Path:
        """Where the config is, with all that the command line changed: in the log folder."""
        return Path(self.log_dir, _config_name(self))


def build_runner(cfg: Config, sources: Sources, evaluation: bool = False) -> Runner:
    """The runner of a config: its own kind of runner if it names one."""
    if 'runner_type' in cfg:
        return RUNNERS.build(sources.apply(cfg))
    runner = (EvaluationRunner if evaluation else ToolRunner).from_cfg(cfg)
    runner.sources = sources
    return runner


def dumped_config(runner: Runner) -> Path:
    """The config of a run with all that the command line changed."""
    return getattr(runner, 'dumped_config', Path(runner.work_dir, _config_name(runner)))


def accumulated(cfg: Config) -> int:
    """Over how many batches gradients accumulate before a step."""
    return int((cfg.get('optim_wrapper') or {}).get('accumulative_counts') or 1)


def _config_name(runner: Runner) -> str:
    return Path(runner.cfg.filename or f'{runner.timestamp}.py').name


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True
