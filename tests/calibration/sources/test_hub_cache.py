"""A Hub id stands for what was downloaded of it; the network is never asked."""

import shutil
from pathlib import Path

import pytest
from command_runs import qvla
from places import DATA

from calibration.sources.hub_cache import find_dataset
from calibration.sources.lerobot import LeRobotDataset
from qvla_export.pipeline.data_source import open_dataset
from qvla_export.shared.errors import QvlaError

NAME = "robots/cube-in.box"
HERE = DATA / "videos/mixed_v21"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_LEROBOT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def add_snapshot(cache: Path, revision: str, reference: str | None, whole: bool = True) -> Path:
    """Lay out a snapshot as the Hub's client does: files are links to blobs."""
    folder = cache / "datasets--robots--cube-in.box"
    snapshot = folder / "snapshots" / revision
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(p for p in HERE.rglob("*") if p.is_file())):
        name = path.relative_to(HERE)
        if not whole and name.parts[0] == "meta":
            continue
        blob = folder / "blobs" / f"{revision}{number}"
        shutil.copy(path, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    if reference:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / reference).write_text(revision)
    return snapshot


def test_an_id_is_found_where_the_hub_keeps_it(home: Path) -> None:
    snapshot = add_snapshot(home / "hub", "0f1e", "main")
    dataset = open_dataset(Path(NAME))
    assert dataset.root == snapshot
    assert dataset.identity()["dataset"] == NAME
    assert dataset.frame(1, 3).observation.images["top"].shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("variable", "cache"),
    [
        ("HF_HUB_CACHE", "cache"),
        ("HUGGINGFACE_HUB_CACHE", "cache"),
        ("HF_LEROBOT_HOME", "cache/hub"),
        ("XDG_CACHE_HOME", "cache/huggingface/hub"),
    ],
)
def test_variables_move_the_cache(
    variable: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    snapshot = add_snapshot(tmp_path / cache, "ab12", "main")
    assert find_dataset(Path(NAME)) == snapshot


def test_what_lerobot_recorded_comes_first(home: Path) -> None:
    add_snapshot(home / "hub", "0f1e", "main")
    recorded = Path(shutil.copytree(HERE, home / "lerobot" / NAME))
    assert find_dataset(Path(NAME)) == recorded
    assert LeRobotDataset(recorded).identity()["dataset"] == "cube-in.box"


def test_a_path_that_exists_is_taken(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_snapshot(home / "hub", "0f1e", "main")
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert find_dataset(Path(NAME)) == Path(NAME)


def test_references_decide_between_snapshots(home: Path) -> None:
    old = add_snapshot(home / "hub", "0001", "v2.1")
    assert find_dataset(Path(NAME)) == old
    new = add_snapshot(home / "hub", "0002", "v3.0")
    assert find_dataset(Path(NAME)) == new
    main = add_snapshot(home / "hub", "0003", "main")
    assert find_dataset(Path(NAME)) == main
    shutil.rmtree(home / "hub/datasets--robots--cube-in.box/refs")
    with pytest.raises(QvlaError, match=r"several snapshots, of which none is current; .*0002"):
        find_dataset(Path(NAME))
    shutil.rmtree(main)
    shutil.rmtree(new)
    assert find_dataset(Path(NAME)) == old


@pytest.mark.parametrize("revision", ["../../../elsewhere", "gone", "é" * 3])
def test_a_reference_leads_nowhere_else(home: Path, revision: str, tmp_path: Path) -> None:
    shutil.copytree(HERE, tmp_path / "home/elsewhere")
    only = add_snapshot(home / "hub", "0001", None)
    (only.parents[1] / "refs").mkdir()
    (only.parents[1] / "refs/main").write_bytes(revision.encode("latin-1"))
    assert find_dataset(Path(NAME)) == only


def test_what_was_not_downloaded_is_answered_with_the_command(home: Path, tmp_path: Path) -> None:
    remedy = "hf download robots/cube-in.box --repo-type dataset"
    add_snapshot(home / "hub", "0001", "main", whole=False)
    with pytest.raises(QvlaError, match=remedy) as refused:
        find_dataset(Path(NAME))
    for place in ("lerobot/robots/cube-in.box", "hub/datasets--robots--cube-in.box"):
        assert str(home / place) in str(refused.value)
    done = qvla("calibrate", "--run", tmp_path / "run", "--dataset", NAME)
    assert done.code == 2 and remedy in done.err
    done = qvla("doctor", "--dataset", NAME, "--json")
    assert remedy in done.out


@pytest.mark.parametrize(
    "address",
    ["hf://datasets/", "https://huggingface.co/datasets/", "http:/huggingface.co/datasets/"],
)
def test_an_id_may_stand_in_an_address(home: Path, address: str) -> None:
    with pytest.raises(QvlaError, match=r"hf download robots/cube-in.box --repo-type dataset"):
        find_dataset(Path(address + NAME))
    only = add_snapshot(home / "hub", "0001", "main")
    assert find_dataset(Path(address + NAME)) == only


def test_commands_take_an_id(home: Path, tmp_path: Path) -> None:
    add_snapshot(home / "hub", "0001", "main")
    run = tmp_path / "run"
    done = qvla(
        "calibrate", "--run", run, "--dataset", NAME, "--count", 2, "--held-out", 2, "--seed", 3
    )
    assert done.code == 0, done.err
    assert NAME in done.out


@pytest.mark.parametrize("text", ["name", "/a/b", "a/b/c", "../a", "a/..", "-a/b", "https://a/b"])
def test_what_is_no_id_is_left_alone(text: str) -> None:
    assert find_dataset(Path(text)) == Path(text)
