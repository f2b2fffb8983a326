"""Every format as its own library writes and reads it; what is assumed; what is refused."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from command_runs import qvla
from small_datasets import write_small_dataset
from small_recordings import served
from small_sources import WRITTEN, write_calib, write_calvin, write_list, write_recordings

from calibration.calibration_set import CalibrationSet, sample_dataset
from calibration.sources.base import BadFrame
from calibration.sources.formats import open_source
from calibration.sources.frame_source import FrameSource
from calibration.sources.hdf5.libero_hdf5 import instruction_of_name
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.rlds.crc32c import crc32c
from calibration.sources.rlds.tf_example import example_features, feature_values
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.data_source import ColumnOptions, open_dataset
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.errors import ArtifactError, QvlaError

RLDS = "rlds/libero_tiny"
FOLD = KeyMap(one_instruction="fold the towel")


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN / name, tmp_path / "data"))


def record_file(root: Path) -> Path:
    return next(root.rglob("*.tfrecord*"))


@pytest.mark.parametrize(
    ("name", "folder", "keys", "cameras"),
    [
        ("rlds", RLDS, KeyMap(), ("image", "wrist_image")),
        ("libero", "libero", KeyMap(), ("agentview_rgb", "eye_in_hand_rgb")),
        ("aloha", "aloha", FOLD, ("cam_high", "cam_left_wrist", "cam_right_wrist")),
    ],
)
def test_frames_are_those_that_the_formats_own_library_reads(
    name: str, folder: str, keys: KeyMap, cameras: tuple[str, ...]
) -> None:
    expected = np.load(WRITTEN / "expected.npz")
    texts = json.loads((WRITTEN / "expected.json").read_text())
    source = open_source(WRITTEN / folder, keys)
    assert source.cameras == cameras
    assert len(source.episode_lengths) == len(
        {key.split("/")[1] for key in expected if name in key}
    )
    for episode, length in enumerate(source.episode_lengths):
        key = f"{name}/{episode}"
        assert length == len(expected[f"{key}/state"])
        phrases = texts.get(f"{key}/instruction", ["fold the towel"] * length)
        for number in range(length):
            frame = source.frame(episode, number)
            for camera in cameras:
                seen = frame.observation.images[camera]
                np.testing.assert_array_equal(seen, expected[f"{key}/{camera}"][number])
            np.testing.assert_array_equal(frame.observation.state, expected[f"{key}/state"][number])
            np.testing.assert_array_equal(frame.action, expected[f"{key}/action"][number])
            assert frame.observation.instruction == phrases[number]
            assert (frame.episode, frame.frame) == (episode, number)
        assert isinstance(source, FrameSource)
        actions = source.actions(episode, 1, length)
        np.testing.assert_array_equal(actions, expected[f"{key}/action"][1:])


@pytest.mark.parametrize(
    ("name", "folder", "columns"),
    [
        ("rlds", RLDS, {"full_image": "image", "wrist_image": "wrist_image"}),
        ("libero", "libero", {"full_image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}),
    ],
)
def test_calibrate_draws_what_independent_code_reads(
    tmp_path: Path, name: str, folder: str, columns: dict[str, str]
) -> None:
    options = ColumnOptions(tuple(f"{camera}={column}" for camera, column in columns.items()))
    dataset = open_dataset(WRITTEN / folder, options)
    drawn = calibrate(RunFolder(tmp_path), CalibrationRequest(dataset, count=4, held_out=4))
    expected = np.load(WRITTEN / "expected.npz")
    texts = json.loads((WRITTEN / "expected.json").read_text())
    places = {
        row.tobytes(): (episode, number)
        for episode in range(4)
        for number, row in enumerate(expected[f"{name}/{episode}/state"])
    }
    observations = (*drawn.observations, *drawn.held_out)
    found = [places[o.state.tobytes()] for o in observations]
    assert len(set(found)) == 8 and len({episode for episode, _ in found}) == 4
    for observation, (episode, number) in zip(observations, found, strict=True):
        assert observation.instruction == texts[f"{name}/{episode}/instruction"][number]
        for camera, column in columns.items():
            pixels = expected[f"{name}/{episode}/{column}"][number]
            np.testing.assert_array_equal(observation.images[camera], pixels)


def test_crc_is_castagnolis() -> None:
    # RFC 3720, B.4; and longer data against the definition.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    for length in (0, 1, 63, 64, 65, 4095, 4096, 5000):
        data = np.random.default_rng(length).bytes(length)
        total = 0xFFFFFFFF
        for byte in data:
            total ^= byte
            for _ in range(8):
                total = total >> 1 ^ (0x82F63B78 if total & 1 else 0)
        assert crc32c(data) == total ^ 0xFFFFFFFF


def test_sequence_examples_and_unpacked_numbers_are_read() -> None:
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    def listed(*features: bytes) -> bytes:
        return b"".join(field(1, one) for one in features)

    one = field(2, b"\x0d" + np.float32(1.5).tobytes() + b"\x0d" + np.float32(-2).tobytes())
    packed = field(3, field(1, b"\x05\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
    entry = field(1, b"x") + field(2, listed(one, packed))
    record = field(2, field(1, entry)) + b"\x18\x07\x21" + bytes(8)
    features = example_features(memoryview(record))["x"]
    assert [np.asarray(feature_values(f)).tolist() for f in features] == [[1.5, -2], [5, -1]]


@pytest.mark.parametrize("place", ["length", "checksum of length", "data", "checksum"])
def test_a_flipped_bit_of_a_record_is_found(tmp_path: Path, place: str) -> None:
    root = copied(RLDS, tmp_path)
    path = record_file(root)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    at = {"length": 2, "checksum of length": 9, "data": 2000, "checksum": 12 + length}[place]
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{path}, .*(checksum is wrong|no TFRecord begins)"):
        source = open_source(root)
        source.frame(0, 0)
    path.write_bytes(data[:3000])
    with pytest.raises(ArtifactError, match=r"is truncated|no TFRecord begins|checksum"):
        open_source(root).frame(0, 0)


def change_info(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "1.0.0/dataset_info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return apply


def change_size(root: Path) -> None:
    path = root / "1.0.0/features.json"
    path.write_text(path.read_text().replace('"8"', '"9"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_info(lambda i: i.update(fileFormat="array_record")),
            "stored as array_record",
        ),
        (change_info(lambda i: i["splits"][0].update(shardLengths=["5"])), "has 4 records, .* 5"),
        (change_info(lambda i: i["splits"][0].update(shardLengths=[None])), r"shardLengths\[0\]"),
        (change_size, r"column observation/state: 40 numbers for 5 steps of 9 each"),
        (lambda root: record_file(root).unlink(), "no TFRecord files lie in it"),
        (
            lambda root: shutil.copytree(root / "1.0.0", root / "1.0.1"),
            r"several data sets or versions; give one of them: .*/1.0.0, .*/1.0.1",
        ),
    ],
)
def test_rlds_that_does_not_fit_its_metadata_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    root = copied(RLDS, tmp_path)
    damage(root)
    with pytest.raises(ArtifactError, match=message):
        open_source(root).frame(0, 0)


def test_columns_are_named_by_path_or_by_its_end() -> None:
    for name in ("joint_state", "observation/joint_state"):
        source = open_source(WRITTEN / RLDS, KeyMap({"full": "image"}, name))
        assert source.frame(0, 0).observation.state.shape == (7,)
        assert source.cameras == ("full",)
    assert open_source(WRITTEN / RLDS, KeyMap(state=None)).frame(0, 0).observation.state.size == 0
    with pytest.raises(QvlaError, match=r"no column front; it has observation/image, .*--camera"):
        open_source(WRITTEN / RLDS, KeyMap({"full": "front"}))
    with pytest.raises(QvlaError, match=r"cameras a, b would all show column observation/image"):
        open_source(WRITTEN / RLDS, KeyMap({"a": "image", "b": "observation/image"}))
    with pytest.raises(ArtifactError, match=r"column language_instruction holds no vector"):
        open_source(WRITTEN / RLDS, KeyMap(state="language_instruction")).frame(0, 0)


def edit_libero(root: Path, change: Callable[[Any], object]) -> Path:
    path = sorted(root.glob("*.hdf5"))[0]
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def test_liberos_pictures_are_turned_as_the_policy_saw_them(tmp_path: Path) -> None:
    root = copied("libero", tmp_path)
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
    root = copied("libero", tmp_path)
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
    root = copied("libero", tmp_path)
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
    path = edit_libero(copied("libero", tmp_path), change)
    with pytest.raises(QvlaError, match=message):
        open_source(path).frame(0, 0)


@pytest.mark.parametrize("length", [0, 8, 1 << 40, (1 << 64) - 24])
def test_a_heap_that_hdf5_would_walk_for_ever_is_refused(tmp_path: Path, length: int) -> None:
    path = copied("aloha", tmp_path) / "episode_2.hdf5"
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    # The first object becomes free space of a length that leads nowhere.
    data[heap + 16 : heap + 32] = bytes(8) + length.to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"the heap of texts at byte {heap} is damaged"):
        open_source(path, FOLD).frame(0, 0)


def test_aloha_says_nothing_of_the_task(tmp_path: Path) -> None:
    root = copied("aloha", tmp_path)
    with pytest.raises(BadFrame, match=r"episode 0, frame 0, column instruction: .*--instruction"):
        open_source(root).frame(0, 0)
    with h5py.File(root / "episode_0.hdf5", "r+") as file:
        file.attrs["instruction"] = "wipe"
        file.create_dataset("spoken", data=[b"zip"] * 5)
    assert open_source(root).frame(0, 0).observation.instruction == "wipe"
    source = open_source(root / "episode_0.hdf5", KeyMap(instruction="spoken"))
    assert source.frame(0, 3).observation.instruction == "zip"


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
    np.savez_compressed(path, rgb_static=np.zeros((12000, 12000, 3), np.uint8), robot_obs=[1.0])
    with pytest.raises(ArtifactError, match=r"432,000,000 bytes, at most"):
        open_source(root, KeyMap(action=None)).frame(0, 0)


def test_lists_of_pictures_are_read(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    source = open_source(root, KeyMap({"full_image": "front", "wrist_image": "wrist"}))
    assert source.episode_lengths == (2, 2, 2)
    frame = source.frame(2, 1)
    assert frame.observation.instruction == "do 2"
    np.testing.assert_array_equal(frame.observation.state, np.float32(rows[5]["state"]))
    np.testing.assert_array_equal(frame.action, np.float32(rows[5]["action"]))
    assert frame.observation.images["full_image"].shape == (10, 10, 3)
    lines = "\n".join(json.dumps(row) for row in rows)
    (root / "frames.jsonl").write_text(lines)
    with pytest.raises(ArtifactError, match="holds 2 lists of pictures"):
        open_source(root)
    again = open_source(root / "frames.jsonl")
    np.testing.assert_array_equal(again.frame(2, 1).action, frame.action)


def test_the_official_codes_lines_are_read(tmp_path: Path) -> None:
    root = write_calib(tmp_path / "calib")
    source = open_source(root)
    assert source.episode_lengths == (1,) * 5
    frame = source.frame(3, 0)
    assert frame.observation.instruction == "pick up 3"
    assert frame.observation.state.size == frame.action.size == 0
    (root / "img/3.png").unlink()
    with pytest.raises(ArtifactError, match=r"episode 3, .*picture not found: .*img/3.png"):
        source.frame(3, 0)
    with (root / "calib.jsonl").open("a") as file:
        file.write('{"text": "", "image": "img/0.png"}\n{"text": "no picture"}\n')
    with pytest.raises(ArtifactError, match=r"calib.jsonl, line 7, image: a text .* got nothing"):
        open_source(root)


def test_recordings_are_demonstrations(tmp_path: Path) -> None:
    root = write_recordings(tmp_path / "runs")
    source = open_source(root)
    # Each observation has an instruction of its own, and so is an episode.
    assert source.episode_lengths == (1,) * 6
    for number in range(6):
        event, frame = served(number, 8), source.frame(number, 0)
        assert event.observation is not None and event.chunk is not None
        assert frame.observation.instruction == event.observation.instruction
        np.testing.assert_array_equal(frame.observation.state, event.observation.state)
        np.testing.assert_array_equal(frame.action, event.chunk.actions[0])
        assert list(frame.observation.images) == list(event.observation.images)
        for name, image in event.observation.images.items():
            np.testing.assert_array_equal(frame.observation.images[name], image)
    joined = open_source(root, FOLD)
    assert joined.frame(0, 0).observation.instruction == "fold the towel"
    drawn = sample_dataset(source, 2, 2, 0)
    assert len(drawn.observations) == 2


def test_what_some_rows_have_the_others_need(tmp_path: Path) -> None:
    """What the first row lacked was left out of all, without a word."""
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    del rows[0]["state"], rows[0]["images"]["wrist"]
    (root / "frames.json").write_text(json.dumps(rows))
    source = open_source(root)
    assert source.cameras == ("front", "wrist")
    assert source.frame(0, 1).observation.state.shape == (4,)
    with pytest.raises(ArtifactError, match=r"\[0\]: no picture of wrist is listed"):
        source.frame(0, 0)
    with pytest.raises(ArtifactError, match=r"\[0\].state: a list of numbers .* got nothing"):
        open_source(root, KeyMap({"front": "front"})).frame(0, 0)


def test_each_camera_of_a_list_has_its_own_picture(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    rows[3]["images"]["wrist"] = rows[3]["images"]["front"]
    (root / "frames.json").write_text(json.dumps(rows))
    with pytest.raises(ArtifactError, match=r"frames.json, \[3\]: each camera has a picture"):
        open_source(root)


def test_states_of_other_formats_have_one_width(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    rows[4]["state"] = [1.0]
    (root / "frames.json").write_text(json.dumps(rows))
    source = open_source(root)
    source.frame(0, 0)
    with pytest.raises(ArtifactError, match=r"episode 2, frame 0, .* 1 numbers, but .* has 4"):
        source.frame(2, 0)


def test_robomimics_files_are_refused_by_name(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        group = file.create_group("data/demo_0")
        group["actions"] = np.zeros((4, 7))
        group["obs/agentview_image"] = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(ArtifactError, match="is robomimic's HDF5, which is not read"):
        open_source(tmp_path)


def test_rows_of_an_episode_follow_each_other(tmp_path: Path) -> None:
    """Its frames were two episodes, and held out from themselves."""
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    (root / "frames.json").write_text(json.dumps([rows[i] for i in (0, 2, 3, 1, 4, 5)]))
    with pytest.raises(ArtifactError, match=r"frames.json, \[3\]: episode 0 has ended before"):
        open_source(root)


def test_rows_without_state_or_instruction_are_named_or_left_out(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    rows[0]["state"] = None
    rows[2]["state"][1] = None
    rows[4]["instruction"] = " "
    (root / "frames.json").write_text(json.dumps(rows))
    source = open_source(root)
    for episode, message in enumerate(
        ("column state: number 0 .* nan", "column state: number 1 .* nan", "instruction is empty")
    ):
        with pytest.raises(BadFrame, match=f"episode {episode}, frame 0, .*{message}"):
            source.frame(episode, 0)
    drawn = sample_dataset(source, 1, 1, 0, 1, skip_bad_frames=True)
    assert all(np.isfinite(o.state).all() for o in (*drawn.observations, *drawn.held_out))
    rows[1]["state"] = "none"
    (root / "frames.json").write_text(json.dumps(rows))
    with pytest.raises(ArtifactError, match=r"frames.json, \[1\].state: a list of numbers"):
        open_source(root).frame(0, 1)


def test_one_instruction_holds_for_every_frame(tmp_path: Path) -> None:
    place = ("--dataset", WRITTEN / "aloha", "--count", 2, "--held-out", 2)
    refused = qvla("calibrate", "--run", tmp_path / "run", *place)
    assert refused.code == 2 and "say it with --instruction TEXT" in refused.err
    done = qvla("calibrate", "--run", tmp_path / "run", *place, "--instruction", "fold it")
    assert done.code == 0, done.err
    drawn = CalibrationSet.load(tmp_path / "run/calibration")
    assert {o.instruction for o in (*drawn.observations, *drawn.held_out)} == {"fold it"}
    lerobot = open_source(write_small_dataset(tmp_path / "demos", [2, 2]), FOLD)
    assert lerobot.frame(1, 1).observation.instruction == "fold the towel"
    assert lerobot.identity()["instruction"] == "fold the towel"


def test_a_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.db3").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"a ROS 2 bag, which is not read; these are: LeRobot"):
        open_source(tmp_path)
    with h5py.File(tmp_path / "mine.hdf5", "w") as file:
        file["poses"] = [1.0]
    with pytest.raises(ArtifactError, match=r"neither LIBERO's, .* nor ALOHA's, .* it has poses"):
        open_source(tmp_path / "mine.hdf5")
    with pytest.raises(ArtifactError, match=f"no recording found: {tmp_path}/nowhere"):
        open_source(tmp_path / "nowhere")
