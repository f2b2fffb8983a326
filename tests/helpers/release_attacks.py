"""A host and a robot, and what somebody between them does to a repository: reason by reason."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from small_releases import (
    Host,
    Robot,
    change_metadata,
    publish_list,
    sign_as,
    vouch,
)

from jetson.install.installation import release_name
from jetson.install.release import Release
from qvla_export.pipeline.release.groups import new_group
from qvla_export.pipeline.release.keys import revoke_key, rotate_keys


@dataclass(frozen=True)
class Scene:
    """A host with two releases; a robot that has installed the first."""

    host: Host
    robot: Robot
    # The repository as the robot saw it.
    seen: Path
    second: Release
    # What the robot is told beside where to look.
    request: dict[str, Any] = field(default_factory=dict)

    def wants(self, release: str) -> None:
        self.request["release"] = release

    def belongs(self, *groups: str) -> None:
        self.request["groups"] = groups

    @property
    def metadata(self) -> Path:
        return self.host.repository.metadata

    @property
    def targets(self) -> Path:
        return self.host.repository.targets

    def blob(self, name: str) -> Path:
        (file,) = (file for file in self.second.files if file.name == name)
        return self.targets / "blobs" / file.sha256


def unsigned_timestamp(scene: Scene) -> None:
    change_metadata(scene.metadata / "timestamp.json", lambda d: d["signatures"].clear())


def unsigned_targets(scene: Scene) -> None:
    change_metadata(scene.metadata / "2.targets.json", lambda d: d["signatures"].clear())


def signed_by_a_stranger(scene: Scene) -> None:
    stranger = Host.new(scene.host.root / "stranger")
    offers = scene.host.repository.offers()
    assert offers is not None
    signed = sign_as(stranger.ring, "targets", offers.signed)
    (scene.metadata / "2.targets.json").write_bytes(signed.to_bytes())


def altered_list(scene: Scene) -> None:
    def change(document: dict) -> None:  # type: ignore[type-arg]  # JSON
        name = release_name(scene.second.digest)
        document["signed"]["targets"][name]["custom"]["serial"] = 99

    change_metadata(scene.metadata / "2.targets.json", change)


def altered_file(scene: Scene) -> None:
    path = scene.blob("policy.onnx")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    remove_patches(scene)


def altered_release(scene: Scene) -> None:
    path = scene.targets / release_name(scene.second.digest)
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))


def truncated_timestamp(scene: Scene) -> None:
    path = scene.metadata / "timestamp.json"
    path.write_bytes(path.read_bytes()[:-70])


def truncated_file(scene: Scene) -> None:
    path = scene.blob("policy.onnx")
    path.write_bytes(path.read_bytes()[:-1])
    remove_patches(scene)


def endless_file(scene: Scene) -> None:
    path = scene.blob("policy.onnx")
    path.write_bytes(path.read_bytes() * 3)
    remove_patches(scene)


def endless_timestamp(scene: Scene) -> None:
    (scene.metadata / "timestamp.json").write_bytes(b" " * 1_000_000)


def rolled_back_repository(scene: Scene) -> None:
    # The robot has seen the second release; now the repository is the earlier one.
    scene.robot.install()
    shutil.rmtree(scene.host.repository.root)
    shutil.copytree(scene.seen, scene.host.repository.root)


def rolled_back_list(scene: Scene) -> None:
    # A new statement of what is newest names an older list.
    scene.robot.install()
    first = scene.host.repository.offers()
    assert first is not None
    first.signed.version = 1
    publish_list(scene.host, sign_as(scene.host.ring, "targets", first.signed))


def frozen_repository(scene: Scene) -> None:
    scene.host.publish(days=-1)


def frozen_root(scene: Scene) -> None:
    # The newest root expired: whoever holds back the next one freezes the robot.
    rotate_keys(scene.host.keys, "snapshot", days=-1)
    root = scene.host.keys / "2.root.json"
    shutil.copy(root, scene.metadata / root.name)


def mixed_list(scene: Scene) -> None:
    shutil.copy(scene.metadata / "1.targets.json", scene.metadata / "2.targets.json")


def mixed_snapshot(scene: Scene) -> None:
    shutil.copy(scene.metadata / "1.snapshot.json", scene.metadata / "2.snapshot.json")


def mixed_release(scene: Scene) -> None:
    # The list names one release and vouches for the document of another.
    document = (scene.targets / release_name(scene.second.digest)).read_bytes()
    vouch(scene.host, {release_name("0" * 64): document}, offer(scene, 9))


def future_format(scene: Scene) -> None:
    document = scene.second.to_bytes().replace(b"qvla-release-1", b"qvla-release-2")
    vouch(scene.host, {release_name("0" * 64): document}, offer(scene, 9))


def another_target(scene: Scene) -> None:
    other = replace(scene.second, target="orin-jp7")
    vouch(scene.host, {release_name(other.digest): other.to_bytes()}, offer(scene, 9))


def extra_file(scene: Scene) -> None:
    file = scene.second.files[-1]
    files = tuple(sorted((*scene.second.files, replace(file, name="zz.so")), key=lambda f: f.name))
    other = replace(scene.second, files=files)
    vouch(scene.host, {release_name(other.digest): other.to_bytes()}, offer(scene, 9))


def missing_file(scene: Scene) -> None:
    files = tuple(file for file in scene.second.files if file.name != "policy.onnx")
    other = replace(scene.second, files=files)
    vouch(scene.host, {release_name(other.digest): other.to_bytes()}, offer(scene, 9))


def missing_blob(scene: Scene) -> None:
    scene.blob("policy.onnx").unlink()
    remove_patches(scene)


def missing_list(scene: Scene) -> None:
    (scene.metadata / "2.targets.json").unlink()


def revoked_timestamp_key(scene: Scene) -> None:
    # Somebody has the old key and says that something is newer.
    thief = scene.host.copy(scene.host.root / "thief")
    rotate_keys(scene.host.keys, "timestamp")
    scene.host.publish()
    scene.robot.install("a")
    thief.publish()
    thief.publish()
    shutil.copy(thief.repository.metadata / "timestamp.json", scene.metadata / "timestamp.json")


def revoked_targets_key(scene: Scene) -> None:
    thief = scene.host.copy(scene.host.root / "thief")
    (keyid,) = scene.host.ring.root.roles["targets"].keyids
    revoke_key(scene.host.keys, keyid[:12])
    scene.host.publish()
    scene.robot.install("a")
    offers = scene.host.repository.offers()
    assert offers is not None
    offers.signed.version += 1
    publish_list(scene.host, sign_as(thief.ring, "targets", offers.signed))


def needs_a_newer_runtime(scene: Scene) -> None:
    other = replace(scene.second, minimum_runtime="99.0")
    vouch(scene.host, {release_name(other.digest): other.to_bytes()}, offer(scene, 9))


def nothing_for_anybody(scene: Scene) -> None:
    offers = scene.host.repository.offers()
    assert offers is not None
    offers.signed.version += 1
    for name in [name for name in offers.signed.targets if name.startswith("releases/")]:
        del offers.signed.targets[name]
    publish_list(scene.host, sign_as(scene.host.ring, "targets", offers.signed))


def another_groups_release(scene: Scene) -> None:
    new_group(scene.host.keys, "line-b")
    folder = scene.host.create(scene.host.root / "release-b" / "bundle", "for-b")
    scene.host.sign(folder, group="line-b")
    scene.host.publish(folder, group="line-b")
    scene.wants("for-b")


def no_such_group(scene: Scene) -> None:
    scene.belongs("line-c")


def offer(scene: Scene, serial: int) -> dict[str, object]:
    return {"name": scene.second.name, "target": scene.robot.target, "serial": serial}


def remove_patches(scene: Scene) -> None:
    shutil.rmtree(scene.targets / "deltas", ignore_errors=True)


ATTACKS: tuple[tuple[str, Callable[[Scene], None]], ...] = (
    ("unsigned", unsigned_timestamp),
    ("unsigned", unsigned_targets),
    ("unsigned", signed_by_a_stranger),
    ("altered", altered_list),
    ("altered", altered_file),
    ("altered", altered_release),
    ("truncated", truncated_timestamp),
    ("truncated", truncated_file),
    ("endless", endless_file),
    ("endless", endless_timestamp),
    ("rolled back", rolled_back_repository),
    ("rolled back", rolled_back_list),
    ("frozen", frozen_repository),
    ("frozen", frozen_root),
    ("mixed", mixed_list),
    ("mixed", mixed_snapshot),
    ("mixed", mixed_release),
    ("wrong target", another_target),
    ("future format", future_format),
    ("revoked key", revoked_timestamp_key),
    ("revoked key", revoked_targets_key),
    ("extra file", extra_file),
    ("missing file", missing_file),
    ("missing file", missing_blob),
    ("missing file", missing_list),
    ("runtime too old", needs_a_newer_runtime),
    ("unknown release", nothing_for_anybody),
    ("unknown group", no_such_group),
    ("not for this robot", another_groups_release),
)
