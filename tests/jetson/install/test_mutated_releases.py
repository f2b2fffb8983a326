"""Whatever becomes of a repository, a robot gets the true bytes of a release, or none."""

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from interruptions import copy_store
from mutated_repositories import Files, MemorySource, mutated, read_files
from small_releases import Host, Robot, sum_bundle
from tuf.api.metadata import Metadata

from jetson.install import installation
from jetson.install.installation import InstallRequest, install
from jetson.install.release import REASONS, RefusedRelease
from jetson.install.store import Store
from jetson.install.store_state import StoreState
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import sha256_file

REQUEST = InstallRequest("memory", "cpu")


@dataclass(frozen=True)
class Scene:
    store: Path
    before: Files
    now: Files
    # File name -> digest of every file, by the digest of its release.
    true: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def scene(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A robot with one release; its repository at that time, and now with a second one."""
    root = tmp_path_factory.mktemp("mutations")
    host = Host.new(root / "host")
    true = {}
    for i, name in enumerate("ab"):
        path = sum_bundle(tiny_policy, root / name, i / 2, table=8192).path
        release = host.release(path, name)
        true[release.digest] = {file.name: file.sha256 for file in release.files}
        if name == "a":
            Robot.of(host, root / "store").install()
            before = read_files(host.repository.root)
    return Scene(root / "store", before, read_files(host.repository.root), true)


def attempt(scene: Scene, store: Store, files: Files) -> str:
    """Try to install from a repository; return what came of it, checked."""
    seen = _version(store)
    source = MemorySource(files)
    with pytest.MonkeyPatch.context() as patch, store.open():
        # What survives a power cut is judged elsewhere.
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(installation, "open_source", lambda place: source)
        try:
            installed = install(store, REQUEST)
        except RefusedRelease as error:
            assert error.reason in REASONS
            outcome = error.reason
        else:
            outcome = f"installed {installed.name}"
            # Who shows what the robot has is no attacker; what is older than it has seen is.
            assert installed.name == "b" or seen == _version(store) == 1
    for folder in store.releases.iterdir():
        found = {path.name: sha256_file(path) for path in (folder / "bundle").iterdir()}
        assert found == scene.true[folder.name]
    assert _version(store) >= seen
    assert set(StoreState.load(store).releases) == {p.name for p in store.releases.iterdir()}
    return outcome


def _version(store: Store) -> int:
    path = store.trust / "timestamp.json"
    return int(Metadata.from_bytes(path.read_bytes()).signed.version)


def try_mutations(scene: Scene, count: int, work: Path, seed: int = 0) -> Counter[str]:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    store = Store(work / "store")
    for _ in range(count):
        if not store.root.exists():
            copy_store(scene.store, store.root)
        told, files = mutated(scene.now, scene.before, rng)
        try:
            outcome = attempt(scene, store, files)
        except BaseException as error:
            error.add_note(f"after: {told}")
            raise
        outcomes[outcome] += 1
        if outcome.startswith("installed") or rng.random() < 0.05:
            shutil.rmtree(store.root)
    return outcomes


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what the disk keeps is judged elsewhere."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


def test_mutated_repositories_install_the_truth_or_nothing(scene: Scene, work: Path) -> None:
    store = Store(work / "untouched")
    copy_store(scene.store, store.root)
    assert attempt(scene, store, scene.now) == "installed b"
    outcomes = try_mutations(scene, 500, work)
    assert outcomes["installed b"] > 20  # what a robot does not read is no harm
    assert {"altered", "truncated", "missing file", "unsigned", "endless"} <= set(outcomes)


@pytest.mark.slow
def test_ten_thousand_mutated_repositories(scene: Scene, work: Path) -> None:
    outcomes = try_mutations(scene, 10_000, work, seed=1)
    assert sum(outcomes.values()) == 10_000
    print(f"\n{dict(outcomes.most_common())}")
