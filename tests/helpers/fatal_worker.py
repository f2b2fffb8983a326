"""The `qvla` command in a process that comes to grief at one of its units of work.

    python fatal_worker.py <kill|raise|hang> <rank> <unit, from 1> <arguments of qvla>

Only before torchrun restarts it.
"""

import os
import signal
import sys
import time

import torch

from qvla_export.cli import main
from qvla_export.measurement.sharded_sums import ShardedSums
from qvla_export.shared.errors import QvlaError

how, rank, fatal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
original, marked = ShardedSums.mark, []


def mark(self: ShardedSums, unit: int) -> None:
    original(self, unit)
    marked.append(unit)
    first_time = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if not first_time or self.world.rank != rank or len(marked) != fatal:
        return
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise QvlaError("the camera of this observation is upside down")
    time.sleep(600)


torch.set_num_threads(1)
ShardedSums.mark = mark  # type: ignore[method-assign]  # what the test is about
sys.argv = ["qvla", *sys.argv[4:]]
main()
