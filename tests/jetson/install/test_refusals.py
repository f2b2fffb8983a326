"""What a robot refuses, by name, from real repositories; what it has stays as it is."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from release_attacks import (
    ATTACKS,
    Scene,
    altered_file,
    altered_list,
    endless_timestamp,
    truncated_file,
)
from small_releases import (
    Host,
    Robot,
    sum_bundle,
)

from jetson.install import installation
from jetson.install.installation import InstallRequest, install
from jetson.install.release import REASONS, RELEASE, RefusedRelease, Release
from jetson.install.release_source import FolderSource
from jetson.install.store import Store
from qvla_export.pipeline.release.inspection import verify_repository
from qvla_export.pipeline.release.keys import rotate_keys
from qvla_export.policies.oft.policy import OftPolicy


@pytest.fixture(scope="module")
def stage(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a host, a robot's store and an earlier repository, to be copied."""
    root = tmp_path_factory.mktemp("stage")
    bundles = [sum_bundle(tiny_policy, root / name, x).path for name, x in (("a", 0), ("b", 0.5))]
    host = Host.new(root / "host")
    host.release(bundles[0], "a")
    Robot.of(host, root / "store").install()
    shutil.copytree(host.repository.root, root / "seen")
    host.release(bundles[1], "b")
    return root


@pytest.fixture
def scene(stage: Path, tmp_path: Path) -> Scene:
    shutil.copytree(stage, tmp_path, dirs_exist_ok=True)
    host = Host(tmp_path / "host")
    robot = Robot.of(host, tmp_path / "store")
    return Scene(host, robot, tmp_path / "seen", Release.load(host.root / "release-b"))


def test_every_reason_has_an_attack() -> None:
    assert {reason for reason, _ in ATTACKS} == set(REASONS)


@pytest.mark.parametrize(
    ("reason", "attack"), ATTACKS, ids=[attack.__name__ for _, attack in ATTACKS]
)
def test_an_attack_is_refused_by_its_name(
    scene: Scene, reason: str, attack: Callable[[Scene], None]
) -> None:
    attack(scene)
    before = sorted(path.name for path in scene.robot.store.releases.iterdir())
    state = scene.robot.state()
    with pytest.raises(RefusedRelease) as refused:
        scene.robot.install(**scene.request)
    assert refused.value.reason == reason, refused.value
    assert str(refused.value).startswith(f"{reason}: ")
    assert sorted(path.name for path in scene.robot.store.releases.iterdir()) == before
    assert scene.robot.state() == state


def test_the_wrong_target_is_said_where_there_is_no_other(scene: Scene, tmp_path: Path) -> None:
    robot = replace(scene.robot, store=Store(tmp_path / "orin"), target="orin-jp7")
    with pytest.raises(RefusedRelease, match=r"wrong target: release 'b' is for cpu, this robot"):
        robot.install()


def test_after_an_attack_the_true_repository_is_good_again(scene: Scene) -> None:
    true = scene.host.copy(scene.host.root / "true")
    for attack in (altered_list, endless_timestamp, truncated_file):
        attack(scene)
        with pytest.raises(RefusedRelease):
            scene.robot.install()
    robot = replace(scene.robot, repository=str(true.repository.root))
    assert robot.install().digest == scene.second.digest


def test_what_was_vouched_for_is_remembered_although_something_after_it_is_refused(
    scene: Scene,
) -> None:
    """Else a refused robot could be shown what is older than what refused it."""
    altered_file(scene)
    with pytest.raises(RefusedRelease):
        scene.robot.install()
    shutil.rmtree(scene.host.repository.root)
    shutil.copytree(scene.seen, scene.host.repository.root)
    with pytest.raises(RefusedRelease) as refused:
        scene.robot.install()
    assert refused.value.reason == "rolled back"


def test_an_endless_answer_ends_at_the_length_that_was_vouched_for(scene: Scene) -> None:
    sent = count()

    class Endless(FolderSource):
        def stream(self, name: str, offset: int = 0) -> Iterator[bytes]:
            if not name.startswith("targets/blobs/"):
                yield from super().stream(name, offset)
                return
            for _ in sent:
                yield b"\0" * 4096

    request = InstallRequest(scene.robot.repository, "cpu")
    with pytest.MonkeyPatch.context() as patch, scene.robot.store.open():
        patch.setattr(installation, "open_source", lambda place: Endless(Path(place)))
        with pytest.raises(RefusedRelease) as refused:
            install(scene.robot.store, request)
    assert refused.value.reason == "endless"
    assert next(sent) * 4096 < 2 * max(file.nbytes for file in scene.second.files)


def test_a_robot_follows_rotated_keys(scene: Scene) -> None:
    for role in ("root", "targets", "snapshot", "timestamp"):
        rotate_keys(scene.host.keys, role)  # type: ignore[arg-type]  # a role
        scene.host.publish()
    assert scene.robot.install().digest == scene.second.digest
    # A robot that was given the newest root only, and one that knows only the first.
    for n, anchor in enumerate(("1.root.json", "5.root.json")):
        fresh = replace(
            scene.robot, store=Store(scene.host.root / f"s{n}"), anchor=scene.host.keys / anchor
        )
        assert fresh.install().digest == scene.second.digest


def test_a_whole_repository_is_verified_as_a_robot_reads_it(scene: Scene) -> None:
    place = str(scene.host.repository.root)
    verified = verify_repository(place, scene.host.anchor)
    assert {release.name for release in verified.releases} == {"a", "b"}
    (scene.targets / "blobs" / "stray").write_bytes(b"x")
    with pytest.raises(RefusedRelease, match="extra file"):
        verify_repository(place, scene.host.anchor)
    (scene.targets / "blobs" / "stray").unlink()
    truncated_file(scene)
    # Its patch is gone too, which is told first or second.
    with pytest.raises(RefusedRelease) as refused:
        verify_repository(place, scene.host.anchor)
    assert refused.value.reason in ("truncated", "missing file")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../b"),
        ("target", ""),
        ("minimum_runtime", "newest"),
        ("bundle_digest", "0" * 63),
        ("files", []),
        ("limits", {"drift": float("1e9"), "p95_ms": None}),
        ("limits", {"drift": -1, "p95_ms": None}),
        ("surplus", 1),
    ],
)
def test_a_release_says_what_releases_say(scene: Scene, field: str, value: object) -> None:
    document = json.loads((scene.host.root / "release-b" / RELEASE).read_text())
    document[field] = value
    with pytest.raises(RefusedRelease) as refused:
        Release.from_bytes((json.dumps(document, indent=1) + "\n").encode(), "it")
    assert refused.value.reason == "altered"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 200, "a\0b"])
def test_no_file_leaves_its_folder(scene: Scene, name: str) -> None:
    document = json.loads((scene.host.root / "release-b" / RELEASE).read_text())
    document["files"][-1]["name"] = name
    with pytest.raises(RefusedRelease, match="a file's name must match"):
        Release.from_bytes(json.dumps(document).encode(), "it")
