"""A stage on Ray: started, watched, restarted and ended, with exit codes that keep their meaning.

Ray Train runs one attempt (`TorchTrainer`: placement, process group, elastic size, one worker per rank); the restarts
are here, because what may be retried is ours to know. An attempt that fails is followed by another, from the newest
committed checkpoint, unless the cause is a mistake that a restart cannot mend; the count of failures starts again
whenever a checkpoint was made in between, so that a run of weeks survives many and a crash loop ends soon.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lbr_dist.config import Recipe
from lbr_dist.errors import EXIT_RUN_AGAIN, UserError, one_line
from lbr_dist.launch.ray_cluster import Bundle, Node, check_room, cluster, living_nodes
from lbr_dist.launch.ray_worker import CONTROLLER, claimed, is_ours, work
from lbr_dist.training.checkpoint.listing import newest, progress
from lbr_dist.training.signals import REPEATED_S, FirstSignal, stop_signals

MAX_FAILURES = 3
"""Failures in a row without a new checkpoint that a run may recover from."""
NODE_WAIT_S = 900.0
"""How long a restart waits for nodes to come back before it gives up."""
RESIZE_S = 30
"""Between two looks of an elastic run for more room."""
POLL_S = 0.5
CONTROLLER_S = 60.0
"""How long a driver that was asked to stop waits for an attempt that is only being started."""

TUNING = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a recipe are not relative to Ray's folders
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # Ray may still count a dead node: soon ask anew, not after 60 s
}
"""Environment of Ray Train. What is set already stays as it is."""


@dataclass(frozen=True)
class Request:
    """What is asked of the cluster."""

    min_workers: int
    max_workers: int
    bundle: Bundle
    max_failures: int = MAX_FAILURES

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.min_workers < self.max_workers


@dataclass(frozen=True)
class Training:
    """What is to be trained: arguments of `train` that stay the same."""

    recipe: Recipe
    allow_change: tuple[str, ...]
    then: Recipe | None

    @property
    def run_dir(self) -> Path:
        """Its folder."""
        return Path(self.recipe.output)


class Stop(FirstSignal):
    """The driver's signals: the first one is passed on to the run."""

    def listen(self) -> None:
        """Take over the signals, also from Ray, which sets its own when it starts."""
        for number in stop_signals():
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.receive(number):
            how = f"stopping after the step under way; once more, after {REPEATED_S:g} s, ends at once"
            print(f"{self.asked}: {how}", file=sys.stderr, flush=True)


def run_stage(
    recipe: Recipe,
    request: Request | Callable[[list[Node]], Request],
    *,
    resume: str,
    allow_change: tuple[str, ...],
    then: Recipe | None = None,
    stop: Stop | None = None,
) -> int:
    """Train a recipe on Ray to its end, or to a request to stop; returns the exit code. No worker is started for a run
    that has reached its end.

    Args:
        recipe: with absolute paths, on storage that every node sees.
        request: how many workers of what size, or a function that says so for the nodes there are.
        resume: for the first attempt; the later ones go on from the newest checkpoint.
        allow_change: see `train`.
        then: see `train`.
        stop: the driver's signals, where it listens already.

    Raises:
        UserError: a restart cannot mend it.
    """
    from lbr_dist.training.origin import outdated
    from lbr_dist.training.preflight import complete

    if resume == "auto" and complete(recipe, allow_change):
        print(f"{recipe.output}: has all its steps already", file=sys.stderr, flush=True)
        found = newest(recipe.output)
        if found and (other := outdated(recipe, found[0])):
            print(other, file=sys.stderr, flush=True)
        return 0
    stop = stop or Stop()
    for name, value in TUNING.items():
        os.environ.setdefault(name, value)
    with cluster() as where:
        stop.listen()
        nodes = living_nodes()
        wanted = request(nodes) if callable(request) else request
        check_room(nodes, wanted.bundle, wanted.min_workers, where)
        return _attempts(Training(recipe, allow_change, then), wanted, where, stop, resume)


def _attempts(training: Training, request: Request, where: str, stop: Stop, resume: str) -> int:
    run_dir, failures = training.run_dir, 0
    while True:
        before = progress(run_dir)
        ended = _attempt(training, request, stop, resume)
        if not isinstance(ended, Exception):
            return ended
        for cause in getattr(ended, "worker_failures", {}).values():
            if isinstance(cause, UserError):
                raise cause
        print(f"error: the attempt failed: {_brief(ended)}", file=sys.stderr, flush=True)
        if stop.asked:
            return EXIT_RUN_AGAIN
        failures = failures + 1 if progress(run_dir) == before else 1
        if failures > request.max_failures:
            print(f"error: {failures} failures without a new checkpoint: giving up", file=sys.stderr)
            return 1
        if progress(run_dir) != before or resume == "never":
            resume = "auto"  # this run's own work
        given_up = _wait_for_room(request, where, stop)
        if given_up is not None:
            return given_up
        print(f"restart {failures} of at most {request.max_failures} without progress", file=sys.stderr, flush=True)


def _attempt(training: Training, request: Request, stop: Stop, resume: str) -> int | Exception:
    """One `TorchTrainer.fit`, in a thread of its own, so that this one hears signals."""
    from lbr_dist.training.signals import request_stop, stop_requested

    run_dir = training.run_dir
    folder = _folder(run_dir)
    trainer = _trainer(training, request, folder, resume)
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit().return_value["exit_code"])
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        if stop.asked and not claimed(folder):  # nothing to lose yet, and maybe nobody who would hear it
            _end_controller(folder, thread)
            return EXIT_RUN_AGAIN
        if stop.asked and thread.is_alive() and is_ours(run_dir, folder) and not stop_requested(run_dir):
            with contextlib.suppress(OSError):
                request_stop(run_dir, stop.asked)
    result = ended[0]
    assert isinstance(result, int | Exception)
    return result


def _end_controller(folder: Path, fit: threading.Thread) -> None:
    """End an attempt from outside, its workers too, and wait until nothing of this process is in a call of Ray's: there
    Ray ends the process with a code of its own when its cluster goes away."""
    import ray

    deadline = time.monotonic() + CONTROLLER_S
    while fit.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # it is only being started
            ray.kill(ray.cloudpickle.loads((folder / CONTROLLER).read_bytes()))
        fit.join(POLL_S)


def _trainer(training: Training, request: Request, folder: Path, resume: str) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from lbr_dist.launch.ray_resize import Restarts

    api: Any = ray.train  # to a type checker its names are those of the older Train
    job = ray.get_runtime_context().get_job_id()
    size = (request.min_workers, request.max_workers) if request.elastic else request.max_workers
    return TorchTrainer(
        work,  # type: ignore[arg-type]  # what it returns, the result carries
        train_loop_config={
            "recipe": training.recipe.model_dump(mode="json"),
            "allow_change": training.allow_change,
            "then": training.then and training.then.model_dump(mode="json"),
            "attempt": str(folder),
            "source": f"ray, job {job}",
            "here": str(Path.cwd()),
        },
        torch_config=TorchConfig(timeout_s=int(training.recipe.step_timeout) + 600),
        scaling_config=api.ScalingConfig(
            num_workers=size,
            use_gpu=request.bundle.gpus > 0,
            resources_per_worker=request.bundle.resources,
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        run_config=api.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=api.FailureConfig(max_failures=0),
            callbacks=[Restarts(training.recipe.output, str(folder), resume)],
        ),
    )


def _folder(run_dir: Path) -> Path:
    """A new folder for what Ray Train writes about this attempt."""
    folder = run_dir / "ray" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"output {run_dir}: cannot be written ({error.strerror}): free space or name a folder on storage that all "
            "nodes share"
        ) from None
    return folder


def _wait_for_room(request: Request, where: str, stop: Stop) -> int | None:
    """Wait until the living nodes have room again, as they had at first.

    Returns:
        The exit code where that is the end: asked to stop meanwhile, or no room within NODE_WAIT_S, which is no mistake
        but a fault, that a later start may not find any more.
    """
    deadline, told = time.monotonic() + NODE_WAIT_S, False
    while not stop.asked:
        try:
            check_room(living_nodes(), request.bundle, request.min_workers, where)
            return None
        except UserError as error:
            if time.monotonic() > deadline:
                print(f"error: waited {NODE_WAIT_S:g} s for nodes: {error}, and run again", file=sys.stderr, flush=True)
                return 1
            if not told:
                print(f"waiting for nodes: {error}", file=sys.stderr, flush=True)
            told = True
        time.sleep(POLL_S)
    return EXIT_RUN_AGAIN


def _brief(error: Exception) -> str:
    """The workers' own words, one line each; what an echo of another's end says comes last."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return one_line(error, 500)
    lines = sorted(
        ((type(cause).__name__ == "ContactLostError", rank, cause) for rank, cause in failures.items()),
        key=lambda item: item[:2],
    )
    return "; ".join(f"rank {rank}: {one_line(cause, 300)}" for _, rank, cause in lines)
