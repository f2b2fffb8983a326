"""CALVIN: annotated stretches, and the pickle that is never loaded."""

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_sources import FOLD, write_calvin

from calibration.sources.formats import open_source
from calibration.sources.lerobot_columns import KeyMap
from qvla_export.shared.errors import ArtifactError


def test_calvins_stretches_have_their_instructions(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "calvin")
    source = open_source(root)
    assert source.episode_lengths == (3, 4)
    assert source.cameras == ("rgb_static", "rgb_gripper")
    frame = source.frame(1, 2)
    stored = np.load(root / "episode_0000006.npz")
    for camera in source.cameras:
        np.testing.assert_array_equal(frame.observation.images[camera], stored[camera])
    np.testing.assert_array_equal(frame.observation.state, stored["robot_obs"].astype(np.float32))
    np.testing.assert_array_equal(frame.action, stored["rel_actions"].astype(np.float32))
    assert frame.observation.instruction == "open the drawer"
    whole = open_source(root, KeyMap(action="actions", one_instruction="play"))
    assert whole.episode_lengths == (4, 4)
    np.testing.assert_array_equal(whole.frame(1, 2).action, stored["actions"].astype(np.float32))


def test_calvins_stretches_that_overlap_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CALVIN's annotations do; a frame of two of them was measured on and judged by."""
    root = write_calvin(tmp_path / "calvin")
    spans = {"c": (4, 7), "a": (0, 3), "b": (2, 5)}
    rows = [{"start": s, "end": e, "instruction": name} for name, (s, e) in spans.items()]
    (root / "lang_annotations.json").write_text(json.dumps(rows))
    source = open_source(root)
    assert source.episode_lengths == (4, 4)
    assert [source.frame(e, 0).observation.instruction for e in (0, 1)] == ["a", "c"]
    assert "1 of 3 stretches begin inside another one" in caplog.text


def test_calvins_pickle_is_never_loaded_and_its_conversion_runs(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "calvin")
    written = (root / "lang_annotations.json").read_text()
    (root / "lang_annotations.json").unlink()
    (root / "lang_annotations").mkdir()
    rows = json.loads(written)
    pickled: Any = {
        "language": {"ann": [row["instruction"] for row in rows]},
        "info": {"indx": [(row["start"], row["end"]) for row in rows]},
    }
    np.save(root / "lang_annotations/auto_lang_ann.npy", pickled, allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"is a pickle, .*convert it once: cd") as e:
        open_source(root)

    command = str(e.value).partition("convert it once: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert json.loads((root / "lang_annotations.json").read_text()) == rows
    np.save(root / "ep_start_end_ids.npy", np.array([pickled]), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"holds pickled objects, which are never loaded"):
        open_source(root, FOLD)
    (root / "lang_annotations.json").unlink()
    (root / "lang_annotations/auto_lang_ann.npy").unlink()
    with pytest.raises(ArtifactError, match=r"say what to do with --instruction TEXT"):
        open_source(root)


def test_an_array_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    root = write_calvin(tmp_path / "calvin")
    path = root / "episode_0000000.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("rgb_static.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (12000, 12000, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ArtifactError, match=r"432,000,000 bytes, at most"):
        open_source(root, KeyMap(state=None, action=None)).frame(0, 0)
