"""Files that a data set names lie inside it: nothing else of this machine is read."""

import json
from pathlib import Path

import pytest
from small_sources import write_list

from calibration.calibration_set import sample_dataset
from calibration.sources.data_paths import path_inside
from calibration.sources.formats import open_source
from calibration.sources.lerobot_columns import KeyMap
from qvla_export.shared.errors import ArtifactError


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    root = write_list(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes((root / "front0.png").read_bytes())
    return root


def name_everywhere(root: Path, name: str) -> None:
    rows = json.loads((root / "frames.json").read_text())
    for row in rows:
        row["images"]["front"] = name
    (root / "frames.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("kind", ["absolute", "upwards", "inside and out", "link", "linked folder"])
def test_pictures_elsewhere_are_refused(listed: Path, kind: str) -> None:
    secret = listed.parent / "secret.png"
    if kind == "link":
        (listed / "link.png").symlink_to(secret)
    elif kind == "linked folder":
        (listed / "folder").symlink_to(listed.parent)
    names = {
        "absolute": str(secret),
        "upwards": "../secret.png",
        "inside and out": f"../{listed.name}/front0.png",
        "link": "link.png",
        "linked folder": "folder/secret.png",
    }
    name_everywhere(listed, names[kind])
    with pytest.raises(ArtifactError, match="lie in its folder"):
        sample_dataset(open_source(listed, KeyMap()), 1, 1, 0, 2, True)


def test_links_within_and_into_the_hub_s_blobs_are_followed(listed: Path, tmp_path: Path) -> None:
    (listed / "link.png").symlink_to("front0.png")
    name_everywhere(listed, "link.png")
    assert sample_dataset(open_source(listed, KeyMap()), 1, 1, 0, 2, True).observations
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots" / "1"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "x").write_bytes(b"")
    (snapshot / "a.png").symlink_to("../../blobs/x")
    (snapshot / "b.png").symlink_to("../../../secret.png")
    assert path_inside(snapshot, "a.png", "here").is_file()
    with pytest.raises(ArtifactError, match="here: a data set's files"):
        path_inside(snapshot, "b.png", "here")


@pytest.mark.parametrize("name", ["", "\0", "/", "..", "a/../../b", "/etc/passwd"])
def test_names_that_are_no_path_inside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="lie in its folder"):
        path_inside(tmp_path, name, "row 1")


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ArtifactError, match="lie in its folder"):
        path_inside(tmp_path, "a", "row 1")
