"""What ends a run and is no bug, in one line each: a mistake, where every further start would meet it again
(`UserError`), or a fault (`FaultError`), after which launchers run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist.disk import BROKEN, DENIED, FULL
from lbr_dist.environment import Environment, lost_contact, out_of_memory
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.training.preflight import Job


class FaultError(RuntimeError):
    """What a later start may not meet again: one line, and exit code 1."""


class ContactLostError(FaultError):
    """Another rank ended, or never came: a consequence, not a cause."""


def explained(error: RuntimeError | MemoryError, job: Job, done: int | None) -> Exception | None:
    """What an error of the machine means; None: that is not known.

    Args:
        error: the library's.
        job: what is run.
        done: finished steps of the run; None: this start was not ready yet.
    """
    if out_of_memory(error):
        return _memory_spent(error, job, done)
    if isinstance(error, RuntimeError) and lost_contact(error):
        return _contact_lost(error, job.environment)
    return None


def _memory_spent(error: RuntimeError | MemoryError, job: Job, done: int | None) -> Exception:
    recipe, tries = job.recipe, list[str]()
    at = "while the model was loaded"
    if done is not None:
        at = f"after step {done}" if done else "in step 1"
        at += f", with micro-batches of up to {recipe.batch.micro_tokens or recipe.data.bin_tokens:,} tokens"
        tries.append("a smaller batch.micro_tokens (or data.bin_tokens)")
        if not recipe.model.activation_checkpointing:
            tries.append("model.activation_checkpointing=true")
    if job.environment.world > 1 and job.regime.stage < 3:
        tries.append("deepspeed=zero3")
    tries.append("more ranks, or deepspeed=zero3_offload")
    said = f"rank {job.environment.rank}: out of memory {at} ({_brief(error)}): try {', then '.join(tries)}"
    return FaultError(said) if done else UserError(said)


def _contact_lost(error: RuntimeError, environment: Environment) -> ContactLostError | None:
    import torch.distributed as dist

    rank, world, reason = f"rank {environment.rank}", environment.world, _brief(error)
    if not dist.is_initialized():
        remedy = "see the others' logs" if world > 1 else "check MASTER_ADDR"
        if "EADDRINUSE" in str(error):
            remedy = "set another MASTER_PORT"
        who = f"the {world} ranks" if world > 1 else "the one rank"
        return ContactLostError(f"{rank}: {who} did not meet at {environment.meeting} ({reason}): {remedy}")
    if world == 1:
        return None
    return ContactLostError(
        f"{rank} lost contact with the other ranks ({reason}): one of them ended or hangs; its own log has the cause"
    )


def _brief(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


@contextmanager
def storage_named(run_dir: Path) -> Iterator[None]:
    """A full disk, and what belongs to another user, are met by each further start; failing storage may come back."""
    try:
        yield
    except OSError as error:
        kind: type[Exception] = UserError
        if error.errno in FULL:
            remedy = "more can be written there"
        elif error.errno in DENIED:
            remedy = "this user may read and write there"
        elif error.errno in BROKEN:
            kind, remedy = FaultError, "the storage works"
        else:
            raise
        raise kind(
            f"{error.filename or f'{run_dir}, the temporary folder or /dev/shm'}: {error.strerror}: see to it that "
            f"{remedy}, and run again; the run goes on from its newest checkpoint"
        ) from error
