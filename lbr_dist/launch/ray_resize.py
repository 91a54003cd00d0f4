"""A growing run saves before it is restarted: otherwise the steps since its last checkpoint would be done twice.

Ray Train resizes by ending the workers and starting others, without notice. Its controller calls this first; the run
is asked to stop in the ordinary way, and the controller goes on when it has, or after a while in any case, since the
newest checkpoint is always there to go on from.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from lbr_dist.training.signals import request_stop, stop_requested

WAIT_S = 300.0


class StopBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Callback of Ray Train's controller."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = Path(run_dir)
        self._running = False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Workers run from here on."""
        self._running = True

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """They do not any more."""
        self._running = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Let the workers save and stop, if there are any."""
        if not self._running:
            return
        self._running = False
        reason = f"a resize to {resize_decision.num_workers} workers"
        request_stop(self._run_dir, reason)
        deadline = time.monotonic() + WAIT_S
        while stop_requested(self._run_dir) == reason and time.monotonic() < deadline:
            time.sleep(0.2)
