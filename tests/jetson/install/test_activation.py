"""What serves: activated after its check, proven after its probation, taken back where it fails."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from small_releases import BOOT, MACHINE, Host, Robot, sum_bundle

from jetson.install import activation, checking, store
from jetson.install.activation import activate, prove, recover, roll_back
from jetson.install.checking import FailedCheck, build_release, check_release, unit_command
from jetson.install.fingerprint import machine_fingerprint
from jetson.install.garbage import collect
from jetson.install.status import list_releases, read_status
from jetson.install.store import Store, StoreBusy, StoreError
from jetson.install.store_state import StoreState, Switch, read_boot_id
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def host(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    root = tmp_path_factory.mktemp("activation")
    host = Host.new(root / "host")
    for i, name in enumerate(NAMES):
        host.release(sum_bundle(tiny_policy, root / name, i / 8, table=64).path, name)
    return host


@pytest.fixture
def robot(host: Host, tmp_path: Path) -> Robot:
    """A robot with three releases that passed their checks."""
    robot = Robot.of(host, tmp_path / "store")
    for name in NAMES:
        robot.pass_check(robot.install(name).digest)
    return robot


def on(robot: Robot, act: Callable[[Store], object]) -> object:
    with robot.store.open():
        return act(robot.store)


def switch_to(robot: Robot, name: str, proven: bool = True) -> None:
    on(robot, lambda s: activate(s, name, MACHINE, BOOT))
    if proven:
        on(robot, lambda s: prove(s, BOOT))


def serving(robot: Robot) -> tuple[str | None, str | None]:
    """Names of current and previous."""
    releases = robot.state().releases
    links = (robot.store.linked(link) for link in ("current", "previous"))
    current, previous = (None if digest is None else releases[digest].name for digest in links)
    return current, previous


def standing(robot: Robot, name: str) -> str:
    return next(one.standing for one in robot.state().releases.values() if one.name == name)


def test_releases_follow_one_another(robot: Robot) -> None:
    switch_to(robot, "a", proven=False)
    assert serving(robot) == ("a", None) and standing(robot, "a") == "probation"
    on(robot, lambda s: prove(s, BOOT))
    assert standing(robot, "a") == "proven"
    switch_to(robot, "b")
    assert serving(robot) == ("b", "a")
    switch_to(robot, "c")
    assert serving(robot) == ("c", "b")
    # What serves already is not switched to again.
    again = on(robot, lambda s: activate(s, "c", MACHINE, BOOT))
    assert isinstance(again, activation.Switched) and not again.changed
    assert standing(robot, "c") == "proven"


def test_going_back_goes_to_what_was_proven(robot: Robot) -> None:
    for name in ("a", "b"):
        switch_to(robot, name)
    switch_to(robot, "c", proven=False)
    on(robot, lambda s: roll_back(s, "it shook", BOOT))
    assert serving(robot) == ("b", "a")
    assert standing(robot, "c") == "failed"
    assert robot.state().find("c") and robot.state().probation is None
    on(robot, lambda s: roll_back(s, "this too", BOOT))
    assert serving(robot) == ("a", None)
    with pytest.raises(StoreError, match="no previous release"):
        on(robot, lambda s: roll_back(s, "and this", BOOT))
    with pytest.raises(StoreError, match=r"'c' is failed: it shook; first: qvla robot verify c"):
        switch_to(robot, "c")


def test_an_unproven_release_is_nothing_to_go_back_to(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b", proven=False)
    switch_to(robot, "c", proven=False)
    assert serving(robot) == ("c", "a")
    on(robot, lambda s: roll_back(s, "bad", BOOT))
    assert serving(robot) == ("a", None)


def test_only_what_was_checked_on_this_machine_is_activated(robot: Robot, host: Host) -> None:
    with robot.store.open():
        state = robot.state()
        digest = state.find("a")
        state.with_release(digest, standing="installed", machine=None).save(robot.store)
        with pytest.raises(StoreError, match="'a' is installed; first: qvla robot verify a"):
            activate(robot.store, "a", MACHINE, BOOT)
        with pytest.raises(StoreError, match="'b' is checked, on this machine as it was then"):
            activate(robot.store, "b", "another-power-mode", BOOT)
        with pytest.raises(StoreError, match="are called 'nothing'"):
            activate(robot.store, "nothing", MACHINE, BOOT)
    assert serving(robot) == (None, None)


def test_a_reboot_or_a_crash_during_probation_goes_back(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b", proven=False)
    same = on(robot, lambda s: activation.roll_back_after_reboot(s, BOOT))
    assert isinstance(same, activation.Switched) and not same.changed
    on(robot, lambda s: activation.roll_back_after_reboot(s, "the-next-boot"))
    assert serving(robot) == ("a", None)
    switch_to(robot, "c", proven=False)
    on(robot, lambda s: activation.roll_back_unproven(s, "crashed", BOOT))
    assert serving(robot) == ("a", None) and standing(robot, "c") == "failed"
    # A proven release is not left because it crashed.
    for act in (
        lambda s: activation.roll_back_unproven(s, "crashed", BOOT),
        lambda s: activation.roll_back_after_reboot(s, "the-next-boot"),
    ):
        on(robot, act)
        assert serving(robot) == ("a", None)
    with pytest.raises(StoreError, match="no release is on probation"):
        on(robot, lambda s: prove(s, BOOT))


def test_the_first_release_stays_although_its_probation_fails(robot: Robot) -> None:
    switch_to(robot, "a", proven=False)
    on(robot, lambda s: activation.roll_back_unproven(s, "crashed", BOOT))
    assert serving(robot) == ("a", None)


def test_a_release_that_somebody_removed_is_left(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b")
    robot.store.release(robot.state().find("b")).rename(robot.store.root / "elsewhere")
    on(robot, lambda s: recover(s, BOOT))
    assert serving(robot) == ("a", None)


def test_a_removed_release_on_probation_holds_nothing_up(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b", proven=False)
    robot.store.release(robot.state().find("b")).rename(robot.store.root / "elsewhere")
    on(robot, lambda s: activation.roll_back_after_reboot(s, "the-next-boot"))
    assert serving(robot) == ("a", None) and robot.state().probation is None


def test_a_release_is_never_its_own_predecessor(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b", proven=False)
    switch_to(robot, "a", proven=False)
    assert serving(robot) == ("a", "b")
    on(robot, lambda s: activation.roll_back_unproven(s, "crashed", BOOT))
    assert serving(robot) == ("b", None)


def test_what_serves_and_was_checked_again_can_be_proven_again(robot: Robot) -> None:
    switch_to(robot, "a")
    robot.pass_check(robot.state().find("a"))
    assert standing(robot, "a") == "checked"
    switch_to(robot, "a")
    assert serving(robot) == ("a", None) and standing(robot, "a") == "proven"


def test_only_the_release_that_was_meant_is_proven_or_left(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b", proven=False)
    other = robot.state().find("c")
    with pytest.raises(StoreError, match=r"was activated while .* was measured; measure again"):
        on(robot, lambda s: prove(s, BOOT, other))
    for act in (roll_back, activation.roll_back_unproven):
        on(robot, partial(act, reason="bad", boot_id=BOOT, meant=other))
        assert serving(robot) == ("b", "a")


def test_what_serves_is_switched_while_a_command_holds_the_store(robot: Robot) -> None:
    with robot.store.open():
        activate(robot.store, "a", MACHINE, BOOT)
        prove(robot.store, BOOT)
    assert serving(robot) == ("a", None)
    with robot.store.switching(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_SWITCH_S", 0.1)
        with pytest.raises(StoreBusy, match="another command holds"):
            activate(robot.store, "b", MACHINE, BOOT)


def test_a_lost_state_is_made_again_from_the_releases(robot: Robot) -> None:
    switch_to(robot, "a")
    robot.store.state.write_text("{")
    with pytest.raises(StoreError, match="remove it and install again"):
        robot.state()
    robot.store.state.unlink()
    on(robot, lambda s: recover(s, BOOT))
    assert {one.name for one in robot.state().releases.values()} == set(NAMES)
    assert serving(robot) == ("a", None)


@pytest.mark.parametrize("moved", [False, True])
def test_a_switch_that_was_begun_is_undone_or_finished(robot: Robot, moved: bool) -> None:
    switch_to(robot, "a")
    state = robot.state()
    old, new = state.find("a"), state.find("b")
    replace(state, switch=Switch(old, new, None)).save(robot.store)
    robot.store.point("previous", old)
    if moved:
        robot.store.point("current", new)
    on(robot, lambda s: recover(s, BOOT))
    assert serving(robot) == (("b", "a") if moved else ("a", None))
    assert standing(robot, "b") == ("probation" if moved else "checked")
    assert robot.state().switch is None


def test_gc_keeps_what_serves_what_is_newest_and_what_may_be_wanted(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b")
    (robot.store.blobs / ".tmp-cut").write_bytes(b"x" * 5000)
    (robot.store.engines / ("0" * 64)).mkdir()
    collected = on(robot, lambda s: collect(s, 0, BOOT))
    assert collected.removed == () and collected.freed_bytes == 5000  # type: ignore[attr-defined]
    assert not list(robot.store.engines.iterdir())
    switch_to(robot, "c")
    collected = on(robot, lambda s: collect(s, 0, BOOT))
    assert collected.removed == ("a",) and collected.freed_bytes > 1000  # type: ignore[attr-defined]
    assert serving(robot) == ("c", "b")
    for folder in robot.store.releases.iterdir():
        Bundle.load(folder / "bundle")
    blobs = {path.name for path in robot.store.blobs.iterdir()}
    assert all((robot.store.blobs / name).stat().st_nlink > 1 for name in blobs)
    # It can be brought back.
    assert robot.install("a").fetched_bytes > 0


def test_status_says_what_serves(robot: Robot) -> None:
    switch_to(robot, "a")
    switch_to(robot, "b", proven=False)
    status = read_status(robot.store)
    assert status["current"]["name"] == "b" and status["probation"]["boot_id"] == BOOT
    assert not status["checked_here"] and status["free_bytes"] > 0
    listed = list_releases(robot.store)["releases"]
    links = [(one["name"], one["link"]) for one in listed]
    assert links == [("c", None), ("b", "current"), ("a", "previous")]
    assert "has changed since `current` was checked" in status["remedy"]
    assert read_status(Store(Path("/nonexistent")))["current"] is None


def test_a_release_is_checked_on_its_golden_observations(
    tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    """Two processes of their own: one release acts as it must, the other does not."""
    host = Host.new(tmp_path / "host")
    host.release(sum_bundle(tiny_policy, tmp_path / "good", table=64).path, "good", drift=1e-3)
    wrong = sum_bundle(tiny_policy, tmp_path / "wrong", 0.125, wrong_by=0.5, table=64)
    host.release(wrong.path, "wrong")
    robot = Robot.of(host, tmp_path / "store")
    robot.install("good")
    machine, boot_id = machine_fingerprint(), read_boot_id()
    with robot.store.open():
        checked = check_release(robot.store, "good", machine, boot_id, samples=20)
        assert checked.to_json()["passed"] and checked.drift < 1e-6 and checked.p95_ms
        assert activate(robot.store, "good", machine, boot_id).changed
        assert checking.renew_current(robot.store, machine, boot_id) is None
        # Nothing to build: the runtime takes the bundle itself.
        assert build_release(robot.store, "good", machine, boot_id).engines is None
    assert standing(robot, "good") == "probation"
    robot.install("wrong")
    with robot.store.open():
        with pytest.raises(FailedCheck, match=r"'wrong' fails its check: .*not activated"):
            check_release(robot.store, "wrong", machine, boot_id, samples=20)
        with pytest.raises(StoreError, match="'wrong' is failed"):
            activate(robot.store, "wrong", machine, boot_id)
    assert serving(robot)[0] == "good"


@pytest.mark.parametrize(
    ("found", "limits", "breach"),
    [
        ({"drift": 0.2}, {"drift": 0.1}, r"drift 2\.00e-01, its limit is 1\.00e-01"),
        ({"p95_ms": 30.0}, {"p95_ms": 20.0}, r"95 in 100 actions take 30\.00 ms, its limit is 20"),
        ({"p95_ms": None}, {"p95_ms": 20.0}, "too few actions were timed"),
        ({"bundle_digest": "1" * 64}, {}, "the bundle has digest 1111"),
        ({"error": "policy.onnx is damaged"}, {}, "policy.onnx is damaged"),
    ],
)
def test_limits_of_a_release_are_kept(
    host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: dict[str, object],
    limits: dict[str, float],
    breach: str,
) -> None:
    mine = host.copy(tmp_path / "host")
    bundle = mine.root / "release-a" / "bundle"
    release = mine.release(bundle, "limited", **limits)
    robot = Robot.of(mine, tmp_path / "store")
    robot.install()
    good = {
        "bundle_digest": release.bundle_digest, "breaches": [], "drift": 0.0, "runtime": "it",
        "p50_ms": 1.0, "p95_ms": 2.0, "observations": 1,
    }  # fmt: skip
    monkeypatch.setattr(
        checking, "_isolated", lambda account, arguments, timeout_s: {**good, **found}
    )
    with robot.store.open(), pytest.raises(FailedCheck, match=breach):
        check_release(robot.store, None, MACHINE, BOOT)
    assert StoreState.load(robot.store).known(release.digest).standing == "failed"
    monkeypatch.setattr(checking, "_isolated", lambda account, arguments, timeout_s: good)
    with robot.store.open():
        check_release(robot.store, None, MACHINE, BOOT)
    assert standing(robot, "limited") == "checked"


def test_a_check_that_crashes_or_hangs_ends_and_is_said(
    robot: Robot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    monkeypatch.setattr(checking.sys, "executable", str(program))
    for script, said in (
        ("kill -SEGV $$", "check ended with signal 11"),
        ("echo out of memory >&2; exit 3", "check ended with status 3: out of memory"),
        ("exec sleep 60", "check has not ended after 0 s"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(checking, "_CHECK_TIMEOUT_S", 0.2 if "sleep" in script else 60.0)
        with robot.store.open(), pytest.raises(FailedCheck, match=said):
            check_release(robot.store, "b", MACHINE, BOOT)
        assert standing(robot, "b") == "failed"


def test_a_build_has_a_unit_of_its_own_where_systemd_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "systemd-run"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unit_command(None, tmp_path / "no-systemd") == ()
    monkeypatch.setattr(checking.os, "geteuid", lambda: 0)
    words = unit_command(None, tmp_path)
    assert words[0] == str(program) and "--property=Nice=10" in words
    assert any(word.startswith("--unit=qvla-build-") for word in words)
