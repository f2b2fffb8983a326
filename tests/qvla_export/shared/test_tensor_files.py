"""Files of tensors: bytes as of safetensors, read one tensor at a time, damage refused."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from safetensors.numpy import load, save

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.tensor_files import open_tensor_file, read_tensor_file, write_tensor_file

KINDS = ("bool", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "f8", "i8", "u8")
FORM = {"format": "test-1", "note": 'a "quoted" \\ é'}
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(KINDS).flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, min_side=0))),
    max_size=6,
)


@given(tensors=TENSORS.filter(lambda found: "__metadata__" not in found))
def test_files_are_those_of_safetensors_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, NDArray[Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "tensors.safetensors"
    write_tensor_file(path, tensors, FORM)
    data = path.read_bytes()
    found, provenance = read_tensor_file(path, "test-1", "tensors")
    assert provenance.items() >= FORM.items()
    assert set(found) == set(tensors)
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert data == save(load(data), header["__metadata__"])


def test_damage_is_refused_before_a_number_is_used(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    write_tensor_file(path, {"a": np.arange(100.0), "b": np.ones(3, np.int8)}, FORM)
    data = path.read_bytes()
    for cut in (0, 4, 8, 40, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ArtifactError, match="truncated or damaged"):
            open_tensor_file(path, "test-1", "tensors")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="checksum is wrong"):
        open_tensor_file(path, "test-1", "tensors")
    path.write_bytes(data.replace(b'"I8"', b'"I7"'))
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        open_tensor_file(path, "test-1", "tensors")
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="format test-2"):
        open_tensor_file(path, "test-2", "tensors")
    stored, _ = open_tensor_file(path, "test-1", "tensors")
    assert stored.shape("a") == (100,) and len(stored) == 2
    path.write_bytes(data[:-900])
    with pytest.raises(ArtifactError, match="cut short"):
        stored["a"]


def test_writing_and_opening_take_the_memory_of_no_more_than_one_tensor(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    tensors = {f"t{number}": np.full(1 << 17, number, np.float64) for number in range(16)}
    one = next(iter(tensors.values())).nbytes
    tracemalloc.start()
    try:
        write_tensor_file(path, tensors, FORM)
        open_tensor_file(path, "test-1", "tensors")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * one
