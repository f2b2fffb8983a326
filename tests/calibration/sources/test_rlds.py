"""RLDS: records, checksums, metadata, columns."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_sources import WRITTEN, copied

from calibration.sources.formats import open_source
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.rlds.crc32c import crc32c
from calibration.sources.rlds.tf_example import example_features, feature_values
from qvla_export.shared.errors import ArtifactError, QvlaError

RLDS = "rlds/libero_tiny"


def record_file(root: Path) -> Path:
    return next(root.rglob("*.tfrecord*"))


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
    root = copied(WRITTEN / RLDS, tmp_path)
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
    root = copied(WRITTEN / RLDS, tmp_path)
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
