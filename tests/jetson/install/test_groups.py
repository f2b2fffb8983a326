"""Lists of releases for some robots only: each robot takes what is meant for it, over HTTP."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_releases import Host, Robot, sign_as, sum_bundle
from static_server import StaticFiles, static_server
from tuf.api.metadata import Metadata, MetaFile, Targets

from jetson.install.installation import InstallRequest, install
from jetson.install.release import RefusedRelease
from jetson.install.store import StoreError
from qvla_export.pipeline.release.groups import (
    GROUPS,
    describe,
    load_groups,
    new_group,
    revoke,
    rotate,
    signatory_of,
)
from qvla_export.pipeline.release.inspection import describe as describe_place
from qvla_export.pipeline.release.inspection import verify_repository
from qvla_export.pipeline.release.keys import KeyRingError
from qvla_export.pipeline.release.publish import PublishRequest, publish
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import write_bytes
from qvla_export.shared.errors import ArtifactError


@dataclass(frozen=True)
class Scene:
    """A repository on a server: a release for everyone, one for line-a, one for arm-07 of it."""

    host: Host
    url: str
    served: type[StaticFiles]
    root: Path

    def robot(self, name: str) -> Robot:
        return Robot.of(self.host, self.root / name, self.url)


@pytest.fixture(scope="module")
def stage(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    root = tmp_path_factory.mktemp("groups")
    host = Host.new(root / "host")
    for i, (name, group) in enumerate((("all", ""), ("for-a", "line-a"), ("for-07", "arm-07"))):
        if group:
            new_group(host.keys, group)
        host.release(sum_bundle(tiny_policy, root / name, i / 8, table=8192).path, name, group)
    # Another group, whose keys lie elsewhere and which has no list yet.
    new_group(host.keys, "line-b")
    host.publish()
    return host


@pytest.fixture
def scene(stage: Host, tmp_path: Path) -> Iterator[Scene]:
    host = stage.copy(tmp_path / "host")
    with static_server(host.repository.root) as (url, served):
        yield Scene(host, url, served, tmp_path)


def test_a_robot_takes_what_is_meant_for_it(scene: Scene) -> None:
    assert scene.robot("r1").install().name == "all"
    assert scene.robot("r2").install(groups=("line-a",)).name == "for-a"
    alone = scene.robot("arm-07")
    assert alone.install(groups=("arm-07", "line-a")).name == "for-07"
    # Its groups are remembered, and everyone's and its group's releases may still be named.
    assert alone.install().name == "for-07"
    assert alone.install("for-a").name == "for-a" and alone.install("all").name == "all"
    # Nothing was published for line-b yet: everyone's.
    assert scene.robot("r3").install(groups=("line-b",)).name == "all"
    asked = [path for path, _ in scene.served.asked if "metadata" in path]
    assert any("arm-07.json" in path for path in asked)
    scene.served.asked.clear()
    scene.robot("r4").install(groups=("line-a",))
    # A robot reads no other robot's list.
    assert not [path for path, _ in scene.served.asked if "arm-07" in path]


def test_another_robots_release_is_refused_by_name(scene: Scene) -> None:
    robot = scene.robot("r1")
    with pytest.raises(RefusedRelease, match=r"not for this robot: .*'for-07' is meant for arm-07"):
        robot.install("for-07", groups=("line-a",))
    with pytest.raises(RefusedRelease, match="this robot is of no group"):
        scene.robot("r2").install("for-a")
    with pytest.raises(RefusedRelease, match="unknown release"):
        robot.install("for-nobody")
    with pytest.raises(RefusedRelease, match=r"unknown group: .*no list for 'line-c'"):
        scene.robot("r3").install(groups=("line-c",))
    with pytest.raises(StoreError, match="--group must match"):
        scene.robot("r4").install(groups=("../x",))
    assert not robot.store.releases.is_dir() or not list(robot.store.releases.iterdir())


def test_a_groups_patch_comes_from_everyones_release(scene: Scene) -> None:
    robot = scene.robot("r1")
    robot.install()
    second = robot.install(groups=("line-a",))
    assert second.name == "for-a" and second.patched == ("policy.onnx",)


def list_of(host: Host, group: str) -> Targets:
    offers = host.repository.offers(group)
    assert offers is not None
    return offers.signed


def show(host: Host, group: str, signed: Metadata[Targets]) -> None:
    """Say that a list of a group is the newest, whoever signed it."""
    snapshot, timestamp = host.repository.snapshot(), host.repository.timestamp()
    assert snapshot is not None and timestamp is not None
    version = signed.signed.version
    write_bytes(host.repository.metadata / f"{version}.{group}.json", signed.to_bytes())
    snapshot.signed.version += 1
    snapshot.signed.meta[f"{group}.json"] = MetaFile(version)
    timestamp.signed.version += 1
    timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
    path = host.repository.metadata / f"{snapshot.signed.version}.snapshot.json"
    write_bytes(path, sign_as(host.ring, "snapshot", snapshot.signed).to_bytes())
    path = host.repository.metadata / "timestamp.json"
    write_bytes(path, sign_as(host.ring, "timestamp", timestamp.signed).to_bytes())


def signed_by(host: Host, group: str, targets: Targets) -> Metadata[Targets]:
    signed = Metadata(targets)
    for signer in signatory_of(host.ring, group).require_signers():
        signed.sign(signer, append=True)
    return signed


def test_a_groups_key_vouches_for_its_own_list_only(scene: Scene) -> None:
    stolen = list_of(scene.host, "line-a")
    stolen.version += 1
    show(scene.host, "line-a", signed_by(scene.host, "arm-07", stolen))
    with pytest.raises(RefusedRelease) as refused:
        scene.robot("r1").install(groups=("line-a",))
    assert refused.value.reason == "unsigned"
    # Nobody else's robots notice.
    assert scene.robot("r2").install(groups=("arm-07",)).name == "for-07"
    assert scene.robot("r3").install().name == "all"


@pytest.mark.parametrize("looks_between", [True, False])
def test_a_groups_old_key_is_called_revoked(scene: Scene, looks_between: bool) -> None:
    """Also by a robot that has not looked since the key was replaced, and after a restart."""
    robot = scene.robot("r1")
    robot.install(groups=("line-a",))
    thief = scene.host.copy(scene.root / "thief")
    (keyid,) = load_groups(scene.host.keys)["line-a"].keys
    revoke(scene.host.keys, keyid[:12])
    scene.host.publish()
    if looks_between:
        robot.install("all")
    stolen = list_of(scene.host, "line-a")
    stolen.version += 1
    show(scene.host, "line-a", signed_by(thief, "line-a", stolen))
    for _ in range(2):
        with pytest.raises(RefusedRelease) as refused:
            robot.install(groups=("line-a",))
        assert refused.value.reason == "revoked key", refused.value
    # Somebody who was never entitled is a stranger still, whatever the note of keys says.
    (robot.store.trust / "group_keys.json").write_text("[]")
    show(scene.host, "line-a", signed_by(scene.host, "arm-07", stolen))
    with pytest.raises(RefusedRelease) as refused:
        robot.install(groups=("line-a",))
    assert refused.value.reason == "unsigned", refused.value


@pytest.mark.parametrize("name", ["releases/{}.json", "releases/line-a/{}.json", "runtimes/{}"])
def test_a_group_vouches_for_nothing_outside_its_paths(scene: Scene, name: str) -> None:
    targets = list_of(scene.host, "arm-07")
    (own,) = (file for path, file in targets.targets.items() if path.startswith("releases/"))
    targets.targets[name.format("0" * 64)] = own
    targets.version += 1
    show(scene.host, "arm-07", signed_by(scene.host, "arm-07", targets))
    with pytest.raises(RefusedRelease, match="unsigned: arm-07 may not vouch for"):
        scene.robot("r1").install(groups=("arm-07",))


def test_lists_that_differ_about_a_file_are_mixed(scene: Scene) -> None:
    targets = list_of(scene.host, "line-a")
    everyone = list_of(scene.host, "")
    name = next(path for path in everyone.targets if path.startswith("blobs/"))
    own = next(file for path, file in targets.targets.items() if path.startswith("releases/"))
    targets.targets[name] = own
    targets.version += 1
    show(scene.host, "line-a", signed_by(scene.host, "line-a", targets))
    with pytest.raises(RefusedRelease, match="mixed: two lists differ"):
        scene.robot("r1").install(groups=("line-a",))


def test_an_older_list_of_a_group_is_rolled_back(scene: Scene) -> None:
    robot = scene.robot("r1")
    before = scene.root / "before"
    shutil.copytree(scene.host.repository.metadata, before)
    folder = scene.host.create(scene.host.root / "release-all" / "bundle", "for-a-2")
    scene.host.sign(folder, group="line-a")
    scene.host.publish(folder, group="line-a")
    assert robot.install(groups=("line-a",)).name == "for-a-2"
    # The snapshot's key is stolen: it names the older list, or none.
    old = Metadata[Targets].from_bytes((before / "1.line-a.json").read_bytes())
    show(scene.host, "line-a", old)
    with pytest.raises(RefusedRelease) as refused:
        robot.install()
    assert refused.value.reason == "rolled back"


def test_a_groups_keys_are_replaced(scene: Scene) -> None:
    robot = scene.robot("r1")
    robot.install(groups=("line-a",))
    thief = scene.host.copy(scene.root / "thief")
    (keyid,) = load_groups(scene.host.keys)["line-a"].keys
    revoke(scene.host.keys, keyid[:12])
    scene.host.publish()
    assert robot.install().name == "for-a"
    stolen = list_of(scene.host, "line-a")
    stolen.version += 1
    show(scene.host, "line-a", signed_by(thief, "line-a", stolen))
    with pytest.raises(RefusedRelease) as refused:
        robot.install()
    assert refused.value.reason == "revoked key"
    rotate(scene.host.keys, "arm-07")
    scene.host.publish()
    assert scene.robot("r2").install(groups=("arm-07",)).name == "for-07"
    with pytest.raises(KeyRingError, match="must be one of"):
        rotate(scene.host.keys, "line-x")


def test_who_has_only_a_groups_key_signs_for_it_alone(scene: Scene) -> None:
    theirs = scene.root / "their-keys"
    theirs.mkdir()
    for path in scene.host.keys.iterdir():
        if path.name.startswith("line-a-") or path.suffix == ".json":
            shutil.copy(path, theirs)
    host = Host(scene.host.root, scene.host.policy)
    folder = host.create(host.root / "release-all" / "bundle", "theirs")
    from qvla_export.pipeline.release.sign import SignRequest, sign

    with pytest.raises(KeyRingError, match="1 private keys must sign as targets, 0 lie"):
        sign(folder, host.repository, theirs)
    assert sign(folder, host.repository, theirs, SignRequest(group="line-a")).signatures == 1
    with pytest.raises(KeyRingError, match="must sign as snapshot"):
        publish(host.repository, theirs, PublishRequest(folder, "line-a"))
    # Who publishes needs no key of the group, nor of the targets.
    for path in (*host.keys.glob("line-a-*"), *host.keys.glob("targets-*")):
        path.unlink()
    host.publish(folder, group="line-a")
    assert scene.robot("r1").install(groups=("line-a",)).name == "theirs"


def test_a_repository_of_groups_is_verified_and_described(scene: Scene) -> None:
    verified = verify_repository(scene.url, scene.host.anchor)
    assert {one.name for one in verified.releases} == {"all", "for-a", "for-07"}
    assert verify_repository(str(scene.host.repository.root), scene.host.anchor) is not None
    described = describe_place(scene.host.repository.root)
    assert described["groups"] == ["line-a", "arm-07", "line-b"]
    assert [one.get("group") for one in described["releases"] if one["name"] == "for-a"] == [
        "line-a"
    ]
    groups = describe(scene.host.keys)["groups"]
    assert isinstance(groups, dict) and set(groups) == {"line-a", "arm-07", "line-b"}


@pytest.mark.parametrize("name", ["root", "targets", "../x", "", "x" * 65, "a.b"])
def test_a_groups_name_is_one(scene: Scene, name: str) -> None:
    with pytest.raises(KeyRingError, match="a group's name must match"):
        new_group(scene.host.keys, name)


def test_groups_that_somebody_damaged_are_refused(scene: Scene) -> None:
    with pytest.raises(KeyRingError, match="has a group 'line-a'"):
        new_group(scene.host.keys, "line-a")
    path = scene.host.keys / GROUPS
    document = json.loads(path.read_text())
    for change, rule in (
        ({"format": "qvla-groups-9"}, "qvla-groups-1 is needed"),
        ({"groups": {"line-a": {"threshold": 2, "keys": {}}}}, "whole number from 1 to 1"),
        ({"groups": {"line-a": {"threshold": 1, "keys": {"00": 3}}}}, "a public key is needed"),
    ):
        path.write_text(json.dumps({**document, **change}))
        with pytest.raises(ArtifactError, match=rule):
            load_groups(scene.host.keys)


def test_a_robot_of_before_groups_reads_the_same_repository(scene: Scene) -> None:
    # Its robot.json names no groups; everyone's list has gained delegations since.
    robot = scene.robot("r1")
    robot.install()
    known = json.loads(robot.store.robot.read_text())
    assert "groups" not in known
    with robot.store.open():
        assert install(robot.store, InstallRequest()).name == "all"
