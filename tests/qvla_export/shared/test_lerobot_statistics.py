"""LeRobot's processor files: every normalization, both layouts, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot_cases import small_features, write_description
from safetensors.numpy import load_file, save_file

from qvla_export.shared.errors import QvlaError
from qvla_export.shared.lerobot.lerobot_config import is_lerobot, read_lerobot_config
from qvla_export.shared.lerobot.lerobot_statistics import (
    POSTPROCESSOR,
    PREPROCESSOR,
    lerobot_statistics,
    read_normalizers,
)
from qvla_export.shared.normalization import Affine, Statistics
from qvla_export.shared.policy_interface import load_interface

BEFORE, AFTER = f"{PREPROCESSOR}.json", f"{POSTPROCESSOR}.json"
VALUES = np.array([[0.3, -2.0, 7.0, 0.0]])
TABLE = {
    "mean": [0.1, 0.2, -0.3, 0.4],
    "std": [0.5, 1.5, 2.0, 0.0],
    "min": [-1.0, -2.0, 0.0, 3.0],
    "max": [2.0, 1.0, 4.0, 3.0],
    "q01": [-0.5, -1.0, 1.0, 3.0],
    "q99": [1.0, 0.5, 2.0, 3.0],
    "count": [20.0],
}
TABLES = {"observation.state": TABLE, "action": TABLE}
FEATURES = small_features(4, 4)


def statistics_of(folder: Path, known: tuple[str, ...] = ()) -> Statistics:
    config = read_lerobot_config(folder)
    return lerobot_statistics(config, *read_normalizers(folder, config, known), None)


def upstream(values: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Normalize and un-normalize as LeRobot's processors do, in float32."""
    table = {name: np.asarray(numbers, np.float32) for name, numbers in TABLE.items()}
    values, eps = values.astype(np.float32), np.float32(1e-8)
    if mode == "IDENTITY":
        return values, values
    if mode == "MEAN_STD":
        return (values - table["mean"]) / (table["std"] + eps), values * table["std"] + table[
            "mean"
        ]
    low, high = (table[name] for name in (("min", "max") if mode == "MIN_MAX" else ("q01", "q99")))
    width = np.where(high == low, eps, high - low)
    return 2 * (values - low) / width - 1, (values + 1) * width / 2 + low


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES", "IDENTITY"])
def test_every_mode_is_upstreams(mode: str, tmp_path: Path) -> None:
    folder = write_description(tmp_path, small_features(4, 4, mode), TABLES)
    found = statistics_of(folder)
    assert found.state is not None
    there, back = upstream(VALUES, mode)
    # A constant dimension divides by 1e-8, which magnifies float32's rounding as much.
    np.testing.assert_allclose(found.state.normalize(VALUES)[:, :3], there[:, :3], atol=1e-5)
    np.testing.assert_allclose(found.state.normalize(VALUES), there, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found.action.unnormalize(VALUES), back, atol=1e-5)
    round_trip = found.action.normalize(found.action.unnormalize(VALUES))
    np.testing.assert_allclose(round_trip[:, :3], VALUES[:, :3], atol=1e-5)
    # Commands are held within what was demonstrated, whatever the mode.
    assert (found.action.low.tolist(), found.action.high.tolist()) == (TABLE["min"], TABLE["max"])
    assert isinstance(found.action, Affine)
    moved = found.action.places(found.action.normalize(np.array([[2.0, -0.5, 0.0, 3.0]])))
    if mode != "IDENTITY":
        np.testing.assert_allclose(moved[0, :3], [1, 0, -1], atol=1e-6)


def test_the_old_layout_gives_the_same_numbers(tmp_path: Path) -> None:
    new = write_description(tmp_path / "new", FEATURES, TABLES)
    old = write_description(tmp_path / "old", FEATURES, {})
    buffers = {
        f"{place}.buffer_{feature}.{name}": np.asarray(TABLE[name], np.float32)
        for place, feature in (
            ("normalize_inputs", "observation_state"),
            ("normalize_targets", "action"),
            ("unnormalize_outputs", "action"),
        )
        for name in ("mean", "std")
    }
    save_file({**buffers, "model.weight": np.zeros(1, np.float32)}, old / "model.safetensors")
    for name in (PREPROCESSOR, POSTPROCESSOR):
        (old / f"{name}.json").unlink()
        (old / f"{name}_statistics.safetensors").unlink()
    expected, found = statistics_of(new), statistics_of(old)
    assert expected.state is not None and found.state is not None
    np.testing.assert_array_equal(found.state.normalize(VALUES), expected.state.normalize(VALUES))
    np.testing.assert_array_equal(
        found.action.unnormalize(VALUES), expected.action.unnormalize(VALUES)
    )
    (old / "model.safetensors").unlink()
    save_file({"model.weight": np.zeros(1, np.float32)}, old / "model.safetensors")
    with pytest.raises(QvlaError, match=r"neither policy_preprocessor\.json nor statistics"):
        statistics_of(old)


def test_a_moved_state_file_is_found_by_its_name(tmp_path: Path) -> None:
    folder = write_description(tmp_path, FEATURES, TABLES)
    before = statistics_of(folder).action.unnormalize(VALUES)
    path = folder / f"{POSTPROCESSOR}.json"
    document = json.loads(path.read_text())
    (step,) = (s for s in document["steps"] if "state_file" in s)
    shutil.move(folder / step["state_file"], folder / "moved.safetensors")
    step["state_file"] = "moved.safetensors"
    path.write_text(json.dumps(document))
    np.testing.assert_array_equal(statistics_of(folder).action.unnormalize(VALUES), before)


def _drop(name: str) -> Any:
    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            kept = {k: v for k, v in load_file(path).items() if k != name}
            save_file(kept, path)

    return change


def _edit(name: str, old: str, new: str) -> Any:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("action.mean"), r"no action\.mean, without which action would pass unchanged"),
        (_drop("observation.state.std"), r"no observation\.state\.std"),
        (
            _edit(f"{PREPROCESSOR}.json", "to_batch_processor", "secret_step"),
            "'secret_step' is not",
        ),
        (
            _edit(BEFORE, f"{PREPROCESSOR}_statistics.safetensors", "../x.safetensors"),
            "folder",
        ),
        (
            _edit(AFTER, "unnormalizer_processor", "device_processor"),
            "one step",
        ),
        (_edit("config.json", '"MEAN_STD"', '"MAGIC"'), "a normalization is one of"),
        (_edit("config.json", '"use_peft": false', '"use_peft": true'), "merge_and_unload"),
        (_edit("config.json", "observation.state", "observation.environment_state"), "no policy"),
        (_edit("config.json", '"action": {', '"wheels": {'), "output_features must be 'action'"),
    ],
)
def test_what_would_act_wrongly_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = write_description(tmp_path, FEATURES, TABLES)
    statistics_of(folder)
    change(folder)
    with pytest.raises(QvlaError, match=message):
        statistics_of(folder)


def test_statistics_that_no_robot_can_have_are_refused(tmp_path: Path) -> None:
    for name, numbers in (("mean", [0, 0, 0, np.nan]), ("std", [1, 1, 1, -2.0]), ("max", [9.0])):
        tables = {"observation.state": TABLE, "action": {**TABLE, name: numbers}}
        folder = write_description(tmp_path, FEATURES, tables)
        with pytest.raises(QvlaError, match=r"action"):
            statistics_of(folder)


def test_the_interface_is_the_configs(tmp_path: Path) -> None:
    folder = write_description(tmp_path, small_features(4, 3, cameras=("top", "wrist")), {})
    assert is_lerobot(folder)
    interface = load_interface(folder)
    assert interface.cameras == ("top", "wrist")
    assert (interface.horizon, interface.action_dim, interface.state_dim) == (5, 3, 4)
    with pytest.raises(QvlaError, match="leave --preset libero out"):
        load_interface(folder, "libero")
    (tmp_path / "other").mkdir()
    assert not is_lerobot(tmp_path / "other")
