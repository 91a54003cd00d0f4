"""What Ray Train's controller does for us, above all when it restarts the workers: to grow, or before a preemption.

It resizes by ending the workers and starting others, without notice, and the steps since the last checkpoint would be
done twice. Its controller calls this first; the run is asked to stop in the ordinary way, and the controller goes on
when it has, or after a while in any case, since the newest checkpoint is always there to go on from. And the new
workers are to go on from there, whatever the first ones were told to resume from.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from lbr_dist.launch.ray_worker import CONTROLLER, RESUME, STARTED, is_ours
from lbr_dist.training.checkpoint.listing import progress
from lbr_dist.training.signals import request_stop, stop_requested

WAIT_S = 300.0
POLL_S = 1.0
"""How long the workers may take to say how they are."""


class Restarts(ControllerCallback, WorkerGroupCallback):
    """Callback of Ray Train's controller.

    Args:
        run_dir: of the run.
        attempt: folder of the attempt, where the workers look for what to resume from.
        resume: what the attempt's first workers resume from.
    """

    def __init__(self, run_dir: str, attempt: str, resume: str) -> None:
        self._run_dir, self._attempt, self._resume = Path(run_dir), Path(attempt), resume
        self._group: Any = None  # that runs
        self._first, self._before = True, progress(self._run_dir)

    def after_controller_start(self, train_run_context: Any) -> None:
        """Leave the driver a handle with which it can end all this."""
        made = self._attempt / f"{CONTROLLER}.new"
        made.write_bytes(ray.cloudpickle.dumps(ray.get_runtime_context().current_actor))
        made.rename(self._attempt / CONTROLLER)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Tell the workers what to resume from."""
        if not self._first and (self._resume == "never" or progress(self._run_dir) != self._before):
            self._resume = "auto"  # this attempt's own work
        self._first = False
        (self._attempt / RESUME).write_text(self._resume, encoding="utf-8")
        (self._attempt / STARTED).write_text("", encoding="utf-8")

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Workers run from here on."""
        self._group = worker_group

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """They do not any more."""
        self._group = None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Let the workers save and stop, if there are any.

        Ray does not look after them meanwhile: where all have ended, or one failed or was lost, nobody answers.
        """
        group, self._group = self._group, None
        if group is None or not is_ours(self._run_dir, self._attempt):
            return  # maybe they still wait for the lock, and the run at work there is another submission's
        reason = f"a resize to {resize_decision.num_workers} workers"
        request_stop(self._run_dir, reason)
        deadline = time.monotonic() + WAIT_S
        while stop_requested(self._run_dir) == reason and time.monotonic() < deadline:
            status = group.poll_status(POLL_S)
            if status.finished or status.errors:
                break
            time.sleep(0.2)
