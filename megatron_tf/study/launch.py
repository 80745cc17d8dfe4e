"""Starts the processes of a run as torchrun does, and ends with the exit code of the one that failed first.

torchrun itself ends with 1 whatever the code was, so that a run that has saved and stopped looks like one that failed.

    python -m megatron_tf.study.launch --standalone --nproc-per-node 2 -m megatron_tf train CONFIG
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(arguments: Sequence[str] | None = None) -> None:
    """`arguments`: those of torchrun; None: of the command line. SystemExit when a process has failed: with its exit
    code, or with 128 + the number of the signal that ended it."""
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
