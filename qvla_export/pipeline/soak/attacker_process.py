"""The attacker: a process of its own, on a core of its own where there is one."""

import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from jetson.clients.protocol_clients import ProtocolName
from qvla_export.pipeline.soak.attacker import Attacker
from qvla_export.pipeline.soak.attacks import ATTACKS
from qvla_export.pipeline.soak.good_clients import PROTOCOLS
from qvla_export.pipeline.soak.server_process import Address
from qvla_export.pipeline.soak.tally import Tally
from qvla_export.shared.errors import QvlaError

# How much longer than it was told to an attack may take, on a busy machine.
_LATE_S = 180.0
_DIED = "the attacker's process died; this is a fault of the soak"
Tallies = dict[ProtocolName, Tally]


class AttackerProcess:
    """Attacks when told to; see `attacker_process`."""

    def __init__(self, told: "Connection[Any, Any]") -> None:
        self._told = told

    def begin(self, attack: str, seconds: float, seed: int) -> None:
        """Begin an attack.

        Raises:
            QvlaError: the attacker died.
        """
        try:
            self._told.send((attack, seconds, seed))
        except OSError:
            raise QvlaError(_DIED) from None

    def finish(self, seconds: float) -> Tallies:
        """Wait for the end of an attack that takes so long; return what came of it.

        Raises:
            QvlaError: the attacker died, or hangs.
        """
        try:
            if self._told.poll(seconds + _LATE_S):
                tallies: Tallies = self._told.recv()
                return tallies
        except EOFError:
            raise QvlaError(_DIED) from None
        raise QvlaError("an attack did not end: the server keeps its attacker waiting")


@contextlib.contextmanager
def attacker_process(address: Address, core: int | None) -> Iterator[AttackerProcess]:
    """Yield an attacker.

    Args:
        address: whom it attacks.
        core: where it runs; None for wherever there is time.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(address, core, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield AttackerProcess(ours)
    finally:
        process.kill()
        process.join()
        ours.close()


def _work(address: Address, core: int | None, told: "Connection[Any, Any]") -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    while True:
        attack, seconds, seed = told.recv()
        end_s = time.monotonic() + seconds
        attacker = Attacker(address, random.Random(seed), {name: Tally() for name in PROTOCOLS})
        while True:
            ATTACKS[attack](attacker)
            if time.monotonic() >= end_s:
                break
        told.send(attacker.tallies)
