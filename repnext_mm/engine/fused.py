"""Evaluating the fused form of what was trained."""

from __future__ import annotations

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..network import Network, Plan, networks_in
from ..reparam import fuse


class FuseForTest(Hook):
    """Fuse the networks of the model once its checkpoint is loaded.

    Args:
        plan: Of the fusion; a rewrite that is not exact is accepted, as the figures show it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def before_test(self, runner: Runner) -> None:
        """Fuse in place, and say what was done.

        Raises:
            TypeError: The model contains no network of this package.
        """
        model = getattr(runner.model, 'module', runner.model).eval()
        for network in networks_in(model, Network, 'fuse'):
            report = fuse(network, self.plan, accept_inexact=True)
            if is_main_process():
                print(
                    str(report).partition('\n')[0].replace('plan', 'Fused with plan', 1), flush=True
                )
