"""A robot that was killed, lost power in the middle of a write, or has a full disk, anywhere."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
from interruptions import HOWS, How, copy_store, interrupted
from small_releases import BOOT, MACHINE, Host, Robot, sum_bundle

from jetson.install.activation import activate, prove, recover, roll_back
from jetson.install.garbage import collect
from jetson.install.store import Store
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

Act = Callable[[Robot], object]


def held(act: Callable[[Store], object]) -> Act:
    def opened(robot: Robot) -> object:
        with robot.store.open():
            return act(robot.store)

    return opened


def prove_once(store: Store) -> None:
    if recover(store, BOOT).probation is not None:
        prove(store, BOOT)


OPERATIONS: dict[str, Act] = {
    "first install": lambda robot: robot.install("a"),
    "install": lambda robot: robot.install(),
    "activate": held(lambda store: activate(store, "b", MACHINE, BOOT)),
    "prove": held(prove_once),
    "roll back": held(lambda store: roll_back(store, "bad", BOOT)),
    "gc": held(lambda store: collect(store, 0, BOOT)),
}


@dataclass(frozen=True)
class Before:
    """A robot just before an operation."""

    robot: Robot
    act: Act

    def again(self, root: Path) -> Robot:
        copy_store(self.robot.store.root, root)
        return replace(self.robot, store=Store(root))


@pytest.fixture(scope="module")
def befores(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Before]:
    """A robot before each operation, all after one another."""
    root = tmp_path_factory.mktemp("interrupted")
    host = Host.new(root / "host")
    a = sum_bundle(tiny_policy, root / "a", 0.0, table=8192).path
    b = sum_bundle(tiny_policy, root / "b", 0.5, table=8192).path
    host.release(a, "a")
    host.release(b, "b")
    robot = Robot.of(host, root / "store")
    robot.store.root.mkdir()
    made = {}
    for n, (name, act) in enumerate(OPERATIONS.items()):
        copy_store(robot.store.root, root / str(n))
        made[name] = Before(replace(robot, store=Store(root / str(n))), act)
        if name == "first install":
            robot.pass_check(robot.install("a").digest)
            with robot.store.open():
                activate(robot.store, "a", MACHINE, BOOT)
                prove(robot.store, BOOT)
        elif name == "install":
            robot.pass_check(robot.install().digest)
        elif name != "prove":  # what is proven is not on probation any more
            act(robot)
    return made


def facts(robot: Robot) -> dict[str, object]:
    """What a store comes to: links, standings, every file of its own name."""
    store, state = robot.store, robot.state()
    files = sorted(p.relative_to(store.root).as_posix() for p in store.root.rglob("*"))
    return {
        "links": [store.linked(link) for link in ("current", "previous")],
        "standings": {one.name: one.standing for one in state.releases.values()},
        "unfinished": (state.switch, state.probation and state.probation.digest),
        "files": files,
    }


@cache
def undisturbed(before: Before, root: Path) -> dict[str, object]:
    robot = before.again(root)
    before.act(robot)
    return facts(robot)


def require_recovery(before: Before, root: Path, moment: int, how: How) -> None:
    """Interrupt, look what serves, and do it again: as if nothing had happened."""
    expected = undisturbed(before, root / "expected")
    robot = before.again(root / "tried")
    served = robot.store.linked("current")
    code, _ = interrupted(lambda: before.act(robot), moment, how)
    # A full disk lets things be removed: nothing may be left that fails.
    assert code != 0 or how == "full"
    # A release that served before serves still, or the one it was switched to.
    if served is not None:
        current = robot.store.linked("current")
        assert current is not None
        Bundle.load(robot.store.bundle(current))
    with robot.store.open():
        recover(robot.store, BOOT)
    for folder in robot.store.releases.iterdir():
        Bundle.load(folder / "bundle")
    # Going back twice would go back further; every other operation may be repeated.
    if before.act is not OPERATIONS["roll back"] or robot.store.linked("current") == served:
        before.act(robot)
    assert facts(robot) == expected
    shutil.rmtree(root)


def cases(befores: dict[str, Before], root: Path) -> list[tuple[str, int, How]]:
    found = []
    for name, before in befores.items():
        robot = before.again(root / "counted")
        code, changes = interrupted(partial(before.act, robot), None, "kill")
        assert code == 0 and changes > 3, name
        found += [(name, moment, how) for moment in range(1, changes + 1) for how in HOWS]
        shutil.rmtree(root / "counted")
    return found


def test_a_robot_recovers_wherever_it_is_interrupted(
    befores: dict[str, Before], tmp_path: Path
) -> None:
    every = cases(befores, tmp_path)
    # Of each operation some.
    some = random.Random(0).sample(every, max(12, len(every) // 20))
    for name, moment, how in some:
        require_recovery(befores[name], tmp_path / "work", moment, how)


@pytest.mark.slow
def test_a_robot_recovers_from_every_interruption(
    befores: dict[str, Before], tmp_path: Path
) -> None:
    every = cases(befores, tmp_path)
    assert {name for name, _, _ in every} == set(OPERATIONS)
    for name, moment, how in every:
        try:
            require_recovery(befores[name], tmp_path / "work", moment, how)
        except BaseException as error:
            error.add_note(f"{name}, change {moment}, {how}")
            raise
    print(f"\n{len(every)} of {len(every)} interruptions recovered")
