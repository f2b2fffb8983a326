"""A release is checked with the runtime that is to serve it: another one has it checked again."""

import importlib.metadata
from pathlib import Path

import pytest
from small_releases import BOOT, MACHINE, Host, Robot, sum_bundle

from jetson.install import checking
from jetson.install.activation import activate
from jetson.install.checking import FailedCheck, check_release, engine_folder, has_changed
from jetson.install.fingerprint import engines_part, machine_fingerprint, runtime_facts
from jetson.install.status import read_status
from jetson.install.store import StoreError
from qvla_export.policies.oft.policy import OftPolicy

_installed = importlib.metadata.version


def install_runtime(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Say that another version of qvla was installed."""
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "qvla" else _installed(name)
    )


@pytest.fixture
def robot(tiny_policy: OftPolicy, tmp_path: Path) -> Robot:
    host = Host.new(tmp_path / "host")
    bundle = sum_bundle(tiny_policy, tmp_path / "bundle", table=64).path
    host.release(bundle, "a", minimum_runtime=_installed("qvla"))
    return Robot.of(host, tmp_path / "store")


def test_another_runtime_has_a_release_checked_before_it_serves(
    robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = robot.install().digest
    before = machine_fingerprint()
    robot.pass_check(digest, before)
    install_runtime(monkeypatch, "9.9")
    after = machine_fingerprint()
    assert runtime_facts()["qvla"] == "9.9" and after != before
    assert has_changed(robot.store, digest, after)
    with (
        robot.store.open(),
        pytest.raises(StoreError, match="on this machine as it was then; first: qvla robot verify"),
    ):
        activate(robot.store, "a", after, BOOT)
    robot.pass_check(digest, after)
    with robot.store.open():
        assert activate(robot.store, "a", after, BOOT).changed
    assert read_status(robot.store)["checked_here"]
    monkeypatch.undo()
    status = read_status(robot.store)
    assert not status["checked_here"] and "or its runtime has changed" in status["remedy"]
    assert status["runtime"]["qvla"] == _installed("qvla")


def test_another_runtime_keeps_the_engines(robot: Robot, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = robot.install().digest
    release = robot.state().known(digest)
    before = machine_fingerprint()
    install_runtime(monkeypatch, "9.9")
    after = machine_fingerprint()
    assert engines_part(after) == engines_part(before) != before
    folders = {engine_folder(robot.store, release, machine) for machine in (before, after)}
    assert folders == {robot.store.engines / release.bundle_digest / engines_part(before)}


def test_an_older_runtime_than_a_release_needs_fails_its_check(
    robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was newer when the release was installed."""
    robot.install()
    monkeypatch.setattr(checking, "_isolated", lambda *_: pytest.fail("it was run"))
    install_runtime(monkeypatch, "0.0.1")
    with (
        robot.store.open(),
        pytest.raises(FailedCheck, match=r"runtime too old: .* 0\.0\.1 is installed; update it"),
    ):
        check_release(robot.store, "a", MACHINE, BOOT)
