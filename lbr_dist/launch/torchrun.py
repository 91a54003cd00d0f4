"""torchrun with exit codes that mean something: 0 done, 2 nothing to retry, 75 run me again, 1 anything else.

torchrun itself ends with 1 whatever its ranks ended with, and takes a stop signal as a reason to kill them. Both would
cost a job its checkpoint before a time limit. So its agent runs here with those signals left to the ranks (Slurm sends
them to every process of a step), and the ranks' own exit codes are read from what it raises.

    python -m lbr_dist.launch.torchrun --nnodes 4 --nproc-per-node 8 ... -m lbr_dist train RECIPE [key=value ...]
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Collection, Sequence

from lbr_dist.errors import EXIT_RUN_AGAIN, EXIT_USER_ERROR


def combined(codes: Collection[int]) -> int:
    """One exit code for several failed ranks; negative ones are signals."""
    if EXIT_USER_ERROR in codes:
        return EXIT_USER_ERROR
    return EXIT_RUN_AGAIN if set(codes) == {EXIT_RUN_AGAIN} else 1


def main(arguments: Sequence[str]) -> int:
    """Run torchrun's agent; `arguments` are torchrun's."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # for the ranks, which would inherit SIG_IGN until they listen
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it calls a stop on request a failure
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--signals-to-handle", "SIGINT", *arguments])
    except ChildFailedError as error:
        code = combined([failure.exitcode for failure in error.failures.values()])
        if code == 1:
            print(error, file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
