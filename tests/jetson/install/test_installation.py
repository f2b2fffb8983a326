"""Install releases from a folder and over HTTP: whole or not at all, and nothing twice."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_releases import Host, Robot, sum_bundle
from static_server import StaticFiles, static_server

from jetson.errors import RemoteError
from jetson.install import installation
from jetson.install.blobs import unpatched
from jetson.install.release import RefusedRelease, Release
from jetson.install.status import read_status
from jetson.install.store import NoSpace, StoreError
from qvla_export.pipeline.release.deltas import patched_frame
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError


@pytest.fixture(scope="module")
def bundles(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return tuple(
        sum_bundle(tiny_policy, folder / name, offset, table=16_384).path
        for name, offset in (("a", 0.0), ("b", 0.125))
    )  # type: ignore[return-value]  # two


@pytest.fixture(scope="module")
def published(bundles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Host:
    host = Host.new(tmp_path_factory.mktemp("published"))
    host.release(bundles[0], "a")
    return host


@pytest.fixture
def host(published: Host, tmp_path: Path) -> Host:
    return published.copy(tmp_path / "host")


@pytest.fixture
def robot(host: Host, tmp_path: Path) -> Robot:
    return Robot.of(host, tmp_path / "store")


def contents(robot: Robot, digest: str) -> dict[str, str]:
    folder = robot.store.bundle(digest)
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_an_installed_release_is_the_bundle_and_is_fetched_once(
    robot: Robot, bundles: tuple[Path, Path]
) -> None:
    first = robot.install()
    assert contents(robot, first.digest) == {p.name: sha256_file(p) for p in bundles[0].iterdir()}
    assert (
        first.fetched_bytes
        == first.release_bytes
        == sum(path.stat().st_size for path in bundles[0].iterdir())
    )
    again = robot.install()
    assert (again.digest, again.fetched_bytes) == (first.digest, 0)
    assert again.present_bytes == first.release_bytes
    # Nothing serves yet.
    assert robot.store.linked("current") is None
    assert robot.state().known(first.digest).standing == "installed"


def test_an_unchanged_file_costs_nothing_and_a_changed_one_its_patch(
    host: Host, robot: Robot, bundles: tuple[Path, Path]
) -> None:
    robot.install()
    folder = host.create(bundles[1], "b")
    signed = host.sign(folder)
    host.publish(folder)
    second = robot.install()
    assert Bundle.load(robot.store.bundle(second.digest)).digest == Bundle.load(bundles[1]).digest
    assert second.patched == ("policy.onnx",)
    (delta,) = (one for one in signed.deltas if one.file == "policy.onnx")
    assert 0 < delta.nbytes < 0.1 * delta.whole_bytes
    changed = sum((bundles[1] / n).stat().st_size for n in ("manifest.json", "golden.safetensors"))
    assert second.fetched_bytes == delta.nbytes + changed


def test_a_wrong_patch_is_no_harm(host: Host, robot: Robot, bundles: tuple[Path, Path]) -> None:
    robot.install()
    host.release(bundles[1], "b")
    (patch,) = (host.repository.targets / "deltas").iterdir()
    patch.write_bytes(patch.read_bytes()[:-20] + b"x" * 20)
    second = robot.install()
    assert second.patched == ()
    assert Bundle.load(robot.store.bundle(second.digest))


def test_other_limits_cost_at_most_a_hundredth(
    host: Host, robot: Robot, bundles: tuple[Path, Path]
) -> None:
    robot.install()
    host.release(bundles[0], "a-stricter", p95_ms=50.0)
    second = robot.install()
    assert second.fetched_bytes == 0
    assert second.present_bytes == second.release_bytes


def test_a_release_is_chosen_by_name_or_digest(
    host: Host, robot: Robot, bundles: tuple[Path, Path]
) -> None:
    first = robot.install("a")
    second = host.release(bundles[1], "b")
    assert robot.install("a").digest == first.digest
    assert robot.install(second.digest[:8]).digest == second.digest
    with pytest.raises(RefusedRelease, match=r"unknown release: .*no release called 'c'"):
        robot.install("c")


def test_a_store_remembers_whom_it_trusts_and_what_it_is(
    host: Host, robot: Robot, tmp_path: Path
) -> None:
    bare = installation.InstallRequest()
    with robot.store.open():
        with pytest.raises(StoreError, match="--root"):
            installation.install(robot.store, bare)
        with pytest.raises(StoreError, match="--from"):
            installation.install(robot.store, installation.InstallRequest(root=host.anchor))
    robot.install()
    with robot.store.open():
        assert installation.install(robot.store, bare).name == "a"
        with pytest.raises(StoreError, match="--target says orin-jp7"):
            installation.install(robot.store, installation.InstallRequest(target="orin-jp7"))
        stranger = Host.new(tmp_path / "stranger")
        with pytest.raises(StoreError, match="trusts another root"):
            installation.install(robot.store, installation.InstallRequest(root=stranger.anchor))


def test_a_description_of_the_robot_that_is_none_is_refused(robot: Robot) -> None:
    robot.install()
    robot.store.robot.write_text("[]")
    for act in (robot.install, lambda: read_status(robot.store)):
        with pytest.raises(ArtifactError, match=r"robot\.json must hold an object.*--from"):
            act()


def test_what_does_not_fit_is_refused_before_anything_is_written(
    robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.statvfs

    def nearly_full(path: Path) -> os.statvfs_result:
        fields = list(whole(path))
        fields[4] = 10  # f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(NoSpace, match=r"needs 1\.\d MB more .* 0\.0 MB are free.*qvla robot gc"):
        robot.install()
    assert not list(robot.store.blobs.iterdir())


def test_one_command_holds_a_store(robot: Robot) -> None:
    with robot.store.open(), pytest.raises(StoreError, match="another command holds"):
        robot.install()


def test_a_damaged_file_of_the_store_is_fetched_again(
    host: Host, robot: Robot, bundles: tuple[Path, Path]
) -> None:
    first = robot.install()
    (file,) = (
        f for f in Release.load(robot.store.release(first.digest)).files if "token" in f.name
    )
    blob = robot.store.blob(file.sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"x" * file.nbytes)
    host.release(bundles[1], "b")
    second = robot.install()
    assert Bundle.load(robot.store.bundle(second.digest))


@pytest.fixture
def served(host: Host) -> Iterator[tuple[str, type[StaticFiles]]]:
    with static_server(host.repository.root) as served:
        yield served


def test_a_static_server_is_a_repository_and_a_cut_download_goes_on(
    host: Host, served: tuple[str, type[StaticFiles]], tmp_path: Path
) -> None:
    url, kind = served
    robot = Robot.of(host, tmp_path / "store", url)
    kind.cut_after = 20_000
    with pytest.raises(RemoteError, match="what came is kept"):
        robot.install()
    (begun,) = robot.store.blobs.glob(".tmp-*")
    assert begun.stat().st_size == 20_000
    kind.cut_after = None
    done = robot.install()
    # What was there is not asked for again.
    assert [wanted for _, wanted in kind.asked if wanted] == ["bytes=20000-"]
    assert done.fetched_bytes + 20_000 <= done.release_bytes
    assert Bundle.load(robot.store.bundle(done.digest))


def test_a_begun_download_that_is_wrong_is_begun_anew(
    robot: Robot, bundles: tuple[Path, Path]
) -> None:
    digest = sha256_file(bundles[0] / "policy.onnx")
    robot.store.blobs.mkdir(parents=True)
    (robot.store.blobs / f".tmp-{digest}").write_bytes(b"\0" * 5000)
    assert Bundle.load(robot.store.bundle(robot.install().digest))


def test_a_server_that_is_not_there_is_said(host: Host, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="could not be fetched"):
        Robot.of(host, tmp_path / "store", "http://127.0.0.1:9").install()
    with pytest.raises(RemoteError, match="repository not found"):
        Robot.of(host, tmp_path / "store", str(tmp_path / "nowhere")).install()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="compares with the program zstd")
def test_a_patch_is_hardly_larger_than_that_of_zstd(bundles: tuple[Path, Path]) -> None:
    old, new = (folder / "policy.onnx" for folder in bundles)
    words = ["zstd", "-q", "-19", f"--patch-from={old}", str(new), "-c"]
    theirs = subprocess.run(words, check=True, capture_output=True).stdout
    ours = patched_frame(old.read_bytes(), new.read_bytes())
    assert len(ours) <= 1.1 * len(theirs)
    assert b"".join(unpatched(old, ours)) == new.read_bytes()
