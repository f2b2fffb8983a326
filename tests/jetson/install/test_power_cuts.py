"""A robot that loses its power at any moment comes up with a release that works."""

import contextlib
import logging
import os
import random
import signal
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from interruptions import copy_store
from power_cuts import disk, why_not
from small_releases import BOOT, MACHINE, Host, Robot, sum_bundle

from jetson.install.activation import activate, prove, recover, roll_back
from jetson.install.garbage import collect
from jetson.install.store import Store
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import QvlaError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def robot(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Robot:
    """A robot whose first release serves; its repository has three."""
    root = tmp_path_factory.mktemp("power")
    host = Host.new(root / "host")
    for i, name in enumerate("abc"):
        host.release(sum_bundle(tiny_policy, root / name, i / 8, table=65_536).path, name)
    robot = Robot.of(host, root / "store")
    robot.pass_check(robot.install("a").digest)
    with robot.store.open():
        activate(robot.store, "a", MACHINE, BOOT)
        prove(robot.store, BOOT)
    return robot


def work_without_end(robot: Robot) -> None:
    """Install, activate, roll back and collect, over and over."""
    for i in count():
        for name in "bc":
            robot.pass_check(robot.install(name).digest)
            with robot.store.open():
                activate(robot.store, name, MACHINE, BOOT)
                if i % 2:
                    prove(robot.store, BOOT)
        with robot.store.open():
            roll_back(robot.store, "bad", BOOT)
            # After an unproven one it serves already.
            if activate(robot.store, "a", MACHINE, BOOT).changed:
                prove(robot.store, BOOT)
            collect(robot.store, 0, BOOT)


def what_is_wrong(robot: Robot) -> str | None:
    """Look at a store after a power cut; return what it is that does not work."""
    try:
        with robot.store.open():
            recover(robot.store, BOOT)
        current = robot.store.linked("current")
        if current is None:
            return "nothing serves"
        for folder in robot.store.releases.iterdir():
            Bundle.load(folder / "bundle")
        Bundle.load(robot.store.bundle(current))
        Bundle.load(robot.store.bundle(robot.install().digest))
    except (QvlaError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def cut_power(robot: Robot, work: Path, cuts: int, synced: bool) -> list[str]:
    """Cut the power so often while a robot works; return what did not recover."""
    rng = random.Random(cuts)
    wrong = []
    with disk(work) as drive:
        copy_store(robot.store.root, drive.mounted / "store")
        os.sync()
        working = replace(robot, store=Store(drive.mounted / "store"))
        child = os.fork()
        if child == 0:
            try:
                if not synced:
                    os.fsync = lambda handle: None  # type: ignore[assignment]  # the careless one
                work_without_end(working)
            except BaseException:
                logging.exception("the robot stopped working")
            finally:
                os._exit(1)
        try:
            for _ in range(cuts):
                time.sleep(rng.uniform(0.0, 0.5))
                with drive.cut() as folder:
                    found = what_is_wrong(replace(robot, store=Store(folder / "store")))
                if found is not None:
                    wrong.append(found)
                ended, _ = os.waitpid(child, os.WNOHANG)
                assert not ended, "the robot stopped working"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return wrong


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_every_power_cut_leaves_a_release_that_works(robot: Robot, tmp_path: Path) -> None:
    wrong = cut_power(robot, tmp_path, 200, synced=True)
    print(f"\n{200 - len(wrong)} of 200 power cuts recovered")
    assert not wrong


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_same_code_without_fsync_fails(robot: Robot, tmp_path: Path) -> None:
    wrong = cut_power(robot, tmp_path, 60, synced=False)
    print(f"\nwithout fsync {len(wrong)} of 60 did not recover: {sorted(set(wrong))[:3]}")
    assert wrong
