"""`qvla keys`, `release` and `robot`: the whole way by commands, and what they answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runs import Outcome, qvla
from small_releases import MACHINE, sum_bundle
from tiny_bundles import change_manifest

from jetson.install import fingerprint
from jetson.install.store import Store, signed_release
from jetson.install.store_state import StoreState
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle


def answer(outcome: Outcome) -> dict[str, Any]:
    """Return the one JSON document that a command prints, whatever comes of it."""
    value: dict[str, Any] = json.loads(outcome.out)
    assert value["ok"] == (outcome.code == 0), outcome.err
    return value


@pytest.fixture
def robot(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    return lambda *words: answer(qvla("robot", *words, "--store", tmp_path / "store"))


def test_the_whole_way(
    tiny_policy: OftPolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    robot: Callable[..., dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingerprint, "this_machine", lambda: (MACHINE, "boot"))
    keys = json.loads(qvla("keys", "new", "keys").out)
    assert keys["roles"]["root"]["threshold"] == 2 and len(keys["roles"]["root"]["keys"]) == 3
    first = None
    for i, name in enumerate("ab"):
        sum_bundle(tiny_policy, tmp_path / f"bundle-{name}", i / 8, table=64)
        made = qvla("release", "create", f"bundle-{name}", "--output", name, "--name", name)
        assert made.out.startswith(f"release {name} ") and made.code == 0
        assert "1 of 1 signatures" in qvla("release", "sign", name, "repo", "--keys", "keys").out
        shown = qvla("release", "publish", "repo", "--keys", "keys", "--release", name)
        assert shown.out.startswith(f"published: {name}, list {i + 1}, until ")
        place = ("--from", "repo", "--target", "cpu", "--root", "keys/1.root.json")
        installed = robot("install", *place) if i == 0 else robot("install")
        assert installed["name"] == name
        with Store(tmp_path / "store").open():
            state = StoreState.load(Store(tmp_path / "store"))
            checked = {"standing": "checked", "machine": MACHINE}
            state.with_release(installed["digest"], **checked).save(Store(tmp_path / "store"))
        assert robot("activate")["changed"] and robot("prove")["current"] == installed["digest"]
        first = first or installed["digest"]
    verified = qvla("release", "verify", "repo", "--root", "keys/1.root.json")
    assert "verified: list 2 until " in verified.out and verified.code == 0
    described = json.loads(qvla("release", "inspect", "repo").out)
    assert [one["name"] for one in described["releases"]] == ["a", "b"]
    assert json.loads(qvla("release", "inspect", "a").out)["digest"] == first
    differing = json.loads(qvla("release", "diff", "a", "b").out)
    assert "policy.onnx" in differing["changed"] and differing["fields"]["name"] == ["a", "b"]
    program = tmp_path / "systemctl"
    program.write_text('#!/bin/sh\necho "$@" >> systemctl.log\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    back = robot("rollback", "--reason", "it shook", "--restart-unit", "qvla-serve.service")
    # A server that was started too often may start again; one that waits for a release is started.
    assert Path("systemctl.log").read_text().splitlines() == [
        "reset-failed qvla-serve.service",
        "show qvla-serve.service --property=ConditionResult --property=ConditionTimestampMonotonic",
        "try-restart qvla-serve.service",
    ]
    assert (back["current"], back["reason"]) == (first, "it shook")
    assert not robot("rollback", "--unproven")["changed"]
    assert not robot("rollback", "--rebooted")["changed"]
    assert robot("update")["why_not"] == "it failed here: it shook"
    assert [one["standing"] for one in robot("list")["releases"]] == ["failed", "proven"]
    assert robot("gc")["removed"] == ["b"]
    assert robot("status")["current"]["digest"] == first
    assert robot("verify", "--if-changed")["passed"] is None
    assert robot("prove", "--unless-proven")["measured"] is None
    served = tmp_path / "store" / "current" / "bundle"
    release = signed_release(served)
    assert release is not None and release.name == "a"
    assert signed_release(tmp_path / "bundle-a") is None
    change_manifest(served, lambda manifest: manifest.update(weight_bytes={"rest": 1}))
    assert Bundle.load(served).digest != release.bundle_digest
    refused = qvla("serve", served, "--port", "0")
    assert refused.code == 2 and "is not what was signed as release" in refused.error
    units = answer(qvla("robot", "units", "--output", "units", "--store", "/srv/qvla"))
    assert all(Path(path).is_file() for path in units["units"])


def test_what_is_refused_is_said_in_json_too(tmp_path: Path) -> None:
    outcome = qvla("robot", "install", "--store", tmp_path / "store")
    assert answer(outcome)["error"].startswith("this robot does not know whom to trust yet")
    assert outcome.code == 2 and "whom to trust" in outcome.error
    qvla("keys", "new", tmp_path / "keys")
    bad = tmp_path / "root.json"
    bad.write_text("{}")
    outcome = qvla("robot", "install", "--root", bad, "--store", tmp_path / "store")
    assert answer(outcome)["refused"] == "altered"


def test_keys_are_replaced_and_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    first = json.loads(qvla("keys", "new", folder).out)
    assert (folder / "1.root.json").is_file()
    # What somebody else's file is called is no version.
    (folder / "old.root.json").write_text("{}")
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.pem"))
    assert "is not empty" in qvla("keys", "new", folder).error
    rotated = json.loads(qvla("keys", "rotate", folder, "timestamp").out)
    assert rotated["root_version"] == 2
    assert (
        rotated["roles"]["timestamp"]["keys"].keys() != first["roles"]["timestamp"]["keys"].keys()
    )
    lost = next(iter(first["roles"]["root"]["keys"]))
    revoked = json.loads(qvla("keys", "revoke", folder, lost).out)
    assert lost not in revoked["roles"]["root"]["keys"]
    assert len(revoked["roles"]["root"]["keys"]) == 3
    assert "must be the start of one key's id" in qvla("keys", "revoke", folder, lost).error
    # Without two of the root's keys nothing is replaced.
    for path in list(folder.glob("root-*.pem"))[1:]:
        path.unlink()
    assert "2 private keys must sign as root, 1 lie" in qvla("keys", "rotate", folder, "root").error
    assert (
        "a threshold of 4 with 3 keys"
        in qvla("keys", "new", tmp_path / "x", "--root-threshold", 4).error
    )


def test_a_group_has_keys_and_releases_of_its_own(
    tiny_policy: OftPolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    robot: Callable[..., dict[str, Any]],
) -> None:
    monkeypatch.chdir(tmp_path)
    qvla("keys", "new", "keys")
    first = json.loads(qvla("keys", "delegate", "keys", "line-a").out)["groups"]["line-a"]
    assert first["threshold"] == 1 and list(first["keys"].values()) == [True]
    sum_bundle(tiny_policy, tmp_path / "bundle", table=64)
    qvla("release", "create", "bundle", "--output", "a", "--name", "a")
    more = ("--keys", "keys", "--group", "line-a")
    assert "a as list 1" in qvla("release", "sign", "a", "repo", *more).out
    unsigned = qvla("release", "publish", "repo", "--keys", "keys", "--release", "a")
    assert "is not signed; first: qvla release sign" in unsigned.error
    shown = qvla("release", "publish", "repo", *more, "--release", "a")
    assert shown.out.startswith("published: a, list 1, until "), shown.err
    place = ("--from", "repo", "--target", "cpu", "--root", "keys/1.root.json")
    assert robot("install", *place)["refused"] == "unknown release"
    assert robot("install", "a", *place)["refused"] == "not for this robot"
    assert robot("install", *place, "--group", "line-a")["name"] == "a"
    rotated = json.loads(qvla("keys", "rotate", "keys", "line-a").out)["groups"]["line-a"]
    assert rotated["keys"].keys() != first["keys"].keys()
    qvla("release", "publish", "repo", "--keys", "keys")
    assert robot("install")["name"] == "a"
    unknown = qvla("release", "sign", "a", "repo", "--keys", "keys", "--group", "line-b")
    assert "knows no group 'line-b', only ['line-a']" in unknown.error
    assert "must be one of" in qvla("keys", "rotate", "keys", "line-b").error
