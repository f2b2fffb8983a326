"""HDF5 of LIBERO and of ALOHA: what is assumed, and what a file leads to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from small_sources import FOLD, WRITTEN, copied

from calibration.calibration_set import sample_dataset
from calibration.sources.base import BadFrame
from calibration.sources.formats import open_source
from calibration.sources.hdf5.libero_hdf5 import instruction_of_name
from calibration.sources.lerobot_columns import KeyMap
from qvla_export.shared.errors import ArtifactError, QvlaError


def edit_libero(root: Path, change: Callable[[Any], object]) -> Path:
    path = sorted(root.glob("*.hdf5"))[0]
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def test_liberos_pictures_are_turned_as_the_policy_saw_them(tmp_path: Path) -> None:
    root = copied(WRITTEN / "libero", tmp_path)
    expected = np.load(WRITTEN / "expected.npz")["libero/0/agentview_rgb"][0]

    def store_upright(file: Any) -> None:
        file["data"].attrs["macros_image_convention"] = "opencv"
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            pixels = file["data/demo_0/obs"][camera]
            pixels[...] = pixels[()][:, ::-1]

    edit_libero(root, store_upright)
    image = open_source(root).frame(0, 0).observation.images["agentview_rgb"]
    np.testing.assert_array_equal(image, expected)
    edit_libero(root, lambda f: f["data"].attrs.update(macros_image_convention="sideways"))
    with pytest.raises(ArtifactError, match=r"opengl or opencv, got 'sideways'"):
        open_source(root).frame(0, 0)


def test_regenerated_libero_says_its_task_in_the_files_name(tmp_path: Path) -> None:
    root = copied(WRITTEN / "libero", tmp_path)
    path = edit_libero(root, lambda f: [f["data"].attrs.__delitem__(n) for n in ["problem_info"]])
    assert open_source(path).frame(0, 0).observation.instruction == "open the drawer"
    assert instruction_of_name(Path("LIVING_ROOM_SCENE2_put_away_demo.hdf5")) == "put away"
    assert instruction_of_name(Path("pick_up_the_bowl_demo.hdf5")) == "pick up the bowl"
    renamed = path.rename(root / "mine.hdf5")
    with pytest.raises(BadFrame, match=r"instruction is empty; .*--instruction TEXT"):
        open_source(renamed).frame(0, 0)
    assert open_source(renamed, FOLD).frame(0, 0).observation.instruction == "fold the towel"


def nan_state(file: Any) -> None:
    file["data/demo_1/obs/gripper_states"][:4, 1] = np.nan


def test_states_that_are_no_numbers_are_named_or_left_out(tmp_path: Path) -> None:
    root = copied(WRITTEN / "libero", tmp_path)
    edit_libero(root, nan_state)
    source = open_source(root)
    with pytest.raises(
        BadFrame,
        match=r"episode 1, frame 2, column .*,obs/gripper_states: number 7 .*nan",
    ):
        source.frame(1, 2)
    drawn = sample_dataset(source, 4, 4, 1, skip_bad_frames=True)
    assert drawn.source["bad_frames"] > 0
    assert all(np.isfinite(o.state).all() for o in (*drawn.observations, *drawn.held_out))


def replace_array(name: str, **how: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file.create_dataset(name, **how)

    return change


def link(name: str, target: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file[name] = target

    return change


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((5, 7), np.float64)
    layout[:] = h5py.VirtualSource("other.hdf5", "data", (5, 7))
    del file["data/demo_0/actions"]
    file.create_virtual_dataset("data/demo_0/actions", layout)


ACTIONS = "data/demo_0/actions"
RGB = "data/demo_0/obs/agentview_rgb"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link(ACTIONS, h5py.ExternalLink("/etc/passwd", "/")), "actions is a link"),
        (link(ACTIONS, h5py.SoftLink("/data/demo_1/actions")), "actions is a link"),
        (virtual, "its data lie in other files"),
        (
            replace_array(ACTIONS, shape=(5, 7), dtype="f8", external=[("other", 0, 280)]),
            "its data lie in other files",
        ),
        (replace_array(ACTIONS, shape=(5, 1 << 40), dtype="f8", chunks=(1, 8)), "cannot be read"),
        (replace_array(RGB, shape=(5, 8, 8, 3), dtype="f4"), "no RGB picture uint8 .* but float32"),
        (replace_array(RGB, shape=(5, 8, 8, 4), dtype="u1"), r"no RGB picture .* \[8, 8, 4\]"),
        (replace_array(RGB, shape=(4, 16, 16, 3), dtype="u1"), r"as many rows, got .*: 4"),
        (
            replace_array(ACTIONS, shape=(5,), dtype=h5py.vlen_dtype(np.float32)),
            "numbers, bytes or texts are read",
        ),
        (
            replace_array(ACTIONS, shape=(5,), dtype=h5py.special_dtype(ref=h5py.Reference)),
            "numbers, bytes or texts are read",
        ),
    ],
)
def test_what_an_hdf5_file_leads_to_elsewhere_is_not_followed(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    path = edit_libero(copied(WRITTEN / "libero", tmp_path), change)
    with pytest.raises(QvlaError, match=message):
        open_source(path).frame(0, 0)


@pytest.mark.parametrize("length", [0, 8, 1 << 40, (1 << 64) - 24])
def test_a_heap_that_hdf5_would_walk_for_ever_is_refused(tmp_path: Path, length: int) -> None:
    path = copied(WRITTEN / "aloha", tmp_path) / "episode_2.hdf5"
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    # The first object becomes free space of a length that leads nowhere.
    data[heap + 16 : heap + 32] = bytes(8) + length.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"the heap of texts at byte {heap} is damaged"):
        open_source(path, FOLD).frame(0, 0)


def test_aloha_says_nothing_of_the_task(tmp_path: Path) -> None:
    root = copied(WRITTEN / "aloha", tmp_path)
    with pytest.raises(BadFrame, match=r"episode 0, frame 0, column instruction: .*--instruction"):
        open_source(root).frame(0, 0)
    with h5py.File(root / "episode_0.hdf5", "r+") as file:
        file.attrs["instruction"] = "wipe"
        file.create_dataset("spoken", data=[b"zip"] * 5)
    assert open_source(root).frame(0, 0).observation.instruction == "wipe"
    source = open_source(root / "episode_0.hdf5", KeyMap(instruction="spoken"))
    assert source.frame(0, 3).observation.instruction == "zip"


def test_robomimics_files_are_refused_by_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        group = file.create_group("data/demo_0")
        group["actions"] = np.zeros((4, 7))
        group["obs/agentview_image"] = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(ArtifactError, match="is robomimic's HDF5, which is not read"):
        open_source(tmp_path)


def test_a_camera_that_one_file_lacks_is_named(tmp_path: Path) -> None:
    root = copied(WRITTEN / "libero", tmp_path)
    last = sorted(root.glob("*.hdf5"))[-1]
    with h5py.File(last, "r+") as file:
        del file["data/demo_0/obs/eye_in_hand_rgb"]
    with pytest.raises(ArtifactError, match=r"no array .*/eye_in_hand_rgb, .*--camera"):
        open_source(root)
    only = open_source(root, KeyMap({"image": "agentview_rgb"}))
    assert only.cameras == ("image",)
