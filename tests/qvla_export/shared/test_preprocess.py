"""Images, prompts and statistics against golden data of upstream's preprocessing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.errors import (
    ArtifactError,
    CheckpointError,
    InvalidObservation,
    StatisticsError,
)
from qvla_export.shared.images import (
    ImageSpec,
    center_crop,
    load_image_spec,
    pixel_values,
    resize_like_training,
)
from qvla_export.shared.normalization import Bounds, load_statistics
from qvla_export.shared.observation import Observation
from qvla_export.shared.pictures.resampling import lanczos
from qvla_export.shared.processor import (
    OPENVLA_PROMPT,
    with_suffix,
)
from qvla_export.shared.processor_json import processor_from_json, processor_to_json

Golden = dict[str, np.ndarray]


def _load(path: Path) -> Golden:
    with np.load(path) as archive:
        return dict(archive)


def _images(golden: Golden) -> Golden:
    return {n.removeprefix("image_"): v for n, v in golden.items() if n.startswith("image_")}


def _spec(oracles: Path, strategy: str, size: int) -> ImageSpec:
    spec = load_image_spec(
        oracles / "preprocess" / "preprocessor_configs" / strategy / "preprocessor_config.json"
    )
    return ImageSpec(size, spec.strategy, spec.means, spec.stds, spec.fill)


def test_image_processor_is_bit_exact(oracles: Path) -> None:
    golden = _load(oracles / "preprocess" / "image_processor.npz")
    images, checked = _images(golden), 0
    for name in golden:
        found = re.fullmatch(r"pixel_values_(resize-naive|letterbox|resize-crop)_(\d+)_(\d+)", name)
        if found is None or found[3] not in images:
            continue
        got = pixel_values(images[found[3]], _spec(oracles, found[1], int(found[2])))
        np.testing.assert_allclose(got, golden[name][0], rtol=0, atol=1e-6, err_msg=name)
        checked += 1
    assert checked >= 3


def test_one_tower_and_the_whole_evaluation_path(oracles: Path) -> None:
    golden = _load(oracles / "preprocess" / "image_processor.npz")
    if "pixel_values_eval_center_crop_224_0" not in golden:
        pytest.skip("the compact oracle subset leaves out the large images")
    evaluation = _load(oracles / "preprocess" / "eval_images.npz")
    got = pixel_values(evaluation["resized224_center_crop_0"], _spec(oracles, "resize-naive", 224))
    np.testing.assert_allclose(
        got, golden["pixel_values_eval_center_crop_224_0"][0], rtol=0, atol=1e-6
    )
    siglip = golden["pixel_values_siglip_only_resize-naive_224_0"][0]
    naive = pixel_values(golden["image_0"], _spec(oracles, "resize-naive", 224))
    np.testing.assert_allclose(naive[3:], siglip, rtol=0, atol=1e-6)


def _close_levels(got: np.ndarray, golden: np.ndarray) -> None:
    difference = np.abs(got.astype(int) - golden.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


def _share_off(got: np.ndarray, golden: np.ndarray) -> float:
    return float((got != golden).mean())


def test_evaluation_images_are_as_near_as_was_measured(oracles: Path) -> None:
    """Upstream's are TensorFlow's; what Pillow and numpy can come to was measured beside them.

    Sums in another order are a level more or less in a few of 150,000 values.
    """
    golden = _load(oracles / "preprocess" / "eval_images.npz")
    stated = json.loads((oracles / "preprocess" / "standin_differences.json").read_text())
    known = {str(entry["image"]): entry for entry in stated}
    images = _images(golden)
    assert images and images.keys() <= known.keys()
    for key, image in images.items():
        best = known[key]
        assert list(image.shape) == best["size"]
        got, small = lanczos(image, 224), golden[f"lanczos_only224_{key}"]
        assert np.abs(got.astype(int) - small).max() <= best["pil_modeF_lanczos_maxdiff"] <= 1
        plain = best["pil_uint8_lanczos_frac_differing"]
        assert _share_off(got, small) < plain / 1000
        crops = (
            (golden[f"resized224_{key}"], golden[f"resized224_center_crop_{key}"]),
            (image, golden[f"raw_center_crop_{key}"]),
        )
        for whole, cropped in crops:
            _close_levels(center_crop(whole), cropped)


def test_evaluation_images(oracles: Path) -> None:
    golden = _load(oracles / "preprocess" / "eval_images.npz")
    images = _images(golden)
    assert images
    for key, image in images.items():
        _close_levels(lanczos(image, 224), golden[f"lanczos_only224_{key}"])
        _close_levels(resize_like_training(image, 224), golden[f"resized224_{key}"])
        turned = np.ascontiguousarray(image[::-1, ::-1])
        _close_levels(resize_like_training(turned, 224), golden[f"libero_rot180_resized224_{key}"])
        _close_levels(
            center_crop(golden[f"resized224_{key}"]), golden[f"resized224_center_crop_{key}"]
        )
        _close_levels(center_crop(image), golden[f"raw_center_crop_{key}"])


def test_prompts(oracles: Path) -> None:
    cases = json.loads((oracles / "preprocess" / "prompts.json").read_text())
    ours = [case for case in cases if case["upstream"].startswith("openvla-oft ")]
    assert ours
    for case in ours:
        assert OPENVLA_PROMPT.format(instruction=case["task_label"].lower()) == case["prompt"]


@given(st.lists(st.integers(0, 31999), min_size=1, max_size=20))
def test_suffix_is_appended_once(ids: list[int]) -> None:
    once = with_suffix(np.asarray(ids), 29871)
    assert once[-1] == 29871
    assert np.array_equal(with_suffix(once, 29871), once)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3))
def test_unnormalize_inverts_normalize(values: list[float]) -> None:
    bounds = Bounds(
        np.array([-2.0, 0.0, 5.0]), np.array([2.0, 0.1, 5.0]), np.array([True, True, False])
    )
    normalized = np.asarray(values)
    back = bounds.normalize(bounds.unnormalize(normalized))
    np.testing.assert_allclose(back, normalized, atol=1e-5)


def test_wrong_unnorm_key_lists_keys_and_the_nearest(tmp_path: Path) -> None:
    limits = {"q01": [0.0] * 7, "q99": [1.0] * 7}
    path = tmp_path / "dataset_statistics.json"
    path.write_text(json.dumps({"libero_spatial_no_noops": {"action": limits}, "bridge": {}}))
    with pytest.raises(StatisticsError, match=r"bridge.*Did you mean 'libero_spatial_no_noops'"):
        load_statistics(path, "libero_spatial", "q99", 7, 0)
    with pytest.raises(StatisticsError, match="choose an unnorm key of"):
        load_statistics(path, None, "q99", 7, 0)
    with pytest.raises(StatisticsError, match=r"must have 6 entries"):
        load_statistics(path, "libero_spatial_no_noops", "q99", 6, 0)
    with pytest.raises(StatisticsError, match=r"'proprio'"):
        load_statistics(path, "libero_spatial_no_noops", "q99", 7, 8)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_statistics(path, None, "q99", 7, 0)


def test_statistics_of_the_configuration_are_read_where_there_is_no_file(tmp_path: Path) -> None:
    """OpenVLA's own checkpoints keep them there; openvla-oft's file, where there, wins."""
    path = tmp_path / "dataset_statistics.json"
    bounds = {"q01": [0.0, 0.0], "q99": [1.0, 2.0]}
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": {"a": {"action": bounds}}}))
    assert load_statistics(path, None, "q99", 2, 0).key == "a"
    with pytest.raises(StatisticsError, match=r"config\.json; it has \['a'\]"):
        load_statistics(path, "b", "q99", 2, 0)
    path.write_text(json.dumps({"b": {"action": bounds}}))
    assert load_statistics(path, None, "q99", 2, 0).key == "b"


@pytest.mark.parametrize("limit", [None, float("nan"), float("inf"), -5.0])
def test_limits_that_the_mask_leaves_out_are_not_judged(tmp_path: Path, limit: object) -> None:
    path = tmp_path / "dataset_statistics.json"
    action = {"q01": [0.0, 0.0], "q99": [1.0, limit], "mask": [True, False]}
    path.write_text(json.dumps({"a": {"action": action}}))
    bounds = load_statistics(path, None, "q99", 2, 0).action
    np.testing.assert_allclose(bounds.unnormalize([1.0, 0.25]), [1.0, 0.25])
    assert np.isfinite(bounds.high).all()
    path.write_text(json.dumps({"a": {"action": {**action, "mask": [True, True]}}}))
    with pytest.raises(StatisticsError, match=r"dimensions \[1\] are \[0"):
        load_statistics(path, None, "q99", 2, 0)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"mask": ["true", "false"]}, "true and false"),
        ({"mask": None}, "true and false"),
        ({"q99": ["1", "2"]}, "list of numbers"),
        ({"q01": 0.0}, "list of numbers"),
    ],
)
def test_statistics_of_the_wrong_kind_are_refused(
    tmp_path: Path, change: dict[str, object], rule: str
) -> None:
    path = tmp_path / "dataset_statistics.json"
    action = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], **change}
    path.write_text(json.dumps({"a": {"action": action}}))
    with pytest.raises(StatisticsError, match=rule):
        load_statistics(path, None, "q99", 2, 0)


@pytest.mark.parametrize(
    ("images", "instruction", "state", "message"),
    [
        ({}, "go", [0.0], "at least one named image"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "go", [0.0], "must be a uint8 array"),
        ({"image": np.zeros((4, 4), np.uint8)}, "go", [0.0], r"must have shape \[h, w, 3\]"),
        ({"image": np.zeros((4, 4, 4), np.uint8)}, "go", [0.0], r"must have shape \[h, w, 3\]"),
        ({"image": np.zeros((4, 4, 3), np.uint8)}, "  ", [0.0], "an instruction is required"),
        ({"image": np.zeros((4, 4, 3), np.uint8)}, "go", [float("nan")], "must be finite"),
        ({"image": np.zeros((4, 4, 3), np.uint8)}, "go", [[0.0]], "must be a vector"),
    ],
)
def test_invalid_observations(
    images: dict[str, np.ndarray], instruction: str, state: list[float], message: str
) -> None:
    with pytest.raises(InvalidObservation, match=message):
        Observation(images, instruction, np.asarray(state))


def test_processor_refuses_what_the_policy_was_not_trained_on(tiny_policy: OftPolicy) -> None:
    image = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(InvalidObservation, match=r"missing \['image'\]"):
        tiny_policy.processor.feeds(Observation({"wrist": image}, "go", np.zeros(4)))
    with pytest.raises(InvalidObservation, match="a state of 4 numbers, got"):
        tiny_policy.processor.feeds(Observation({"image": image}, "go", np.zeros(3)))


def test_processor_round_trips_through_json(tiny_policy: OftPolicy) -> None:
    processor = tiny_policy.processor
    stored = json.loads(json.dumps(processor_to_json(processor)))
    again = processor_from_json(stored, processor.tokenizer)
    assert again.spec == processor.spec
    observation = Observation({"image": np.full((40, 30, 3), 9, np.uint8)}, "Go", np.ones(4) / 3)
    for name, value in processor.feeds(observation).items():
        np.testing.assert_array_equal(again.feeds(observation)[name], value)
    del stored["spec"]["horizon"]
    with pytest.raises(ArtifactError, match="horizon"):
        processor_from_json(stored, None)


def test_preprocessor_of_another_kind_is_refused(oracles: Path, tmp_path: Path) -> None:
    source = oracles / "preprocess/preprocessor_configs/resize-naive/preprocessor_config.json"
    config = json.loads(source.read_text())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**config, "image_resize_strategy": "stretch"}))
    with pytest.raises(CheckpointError, match="'stretch'"):
        load_image_spec(path)
    del config["input_sizes"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="input_sizes"):
        load_image_spec(path)
