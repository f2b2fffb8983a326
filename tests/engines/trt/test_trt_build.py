"""Engines are built stage by stage, kept, resumed, refused with a reason; by both modules."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from trt_bundles import PartGraph, bundle_of_parts

from engines.trt.builder import BuildSettings, build_engines
from engines.trt.modules import BuildError
from engines.trt.shapes import PromptRange, ShapeRange
from engines.trt.sidecar import Sidecar, engine_path, sidecar_path
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

Observations = Callable[..., Any]
NAMES = ["vision", "decoder", "head"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path_factory: Any
) -> Bundle:
    return bundle_of_parts(tiny_policy, tiny_observations(1), tmp_path_factory.mktemp("b") / "rtx")


class Watch:
    """Hears which stages are really built, and may interrupt one."""

    def __init__(self, interrupt: str | None = None) -> None:
        self.stages: list[str] = []
        self._interrupt = interrupt

    def __call__(self, stage: str, phase: str, done: int, steps: int) -> None:
        assert 0 <= done <= steps
        if stage not in self.stages:
            self.stages.append(stage)
        if stage == self._interrupt and done:
            raise KeyboardInterrupt


def build(bundle: Bundle, folder: Path, watch: Watch | None = None, **settings: Any) -> Any:
    return build_engines(bundle, folder, BuildSettings(**settings), watch, find=lambda: None)


def test_every_stage_has_an_engine_and_a_sidecar(bundle: Bundle, tmp_path: Path) -> None:
    watch = Watch()
    sidecars = build(bundle, tmp_path / "e", watch, prompt=PromptRange(2, 8, 16), level=1)
    assert watch.stages == NAMES
    assert {p.name for p in (tmp_path / "e").iterdir()} == {
        f"{name}.{suffix}" for name in NAMES for suffix in ("engine", "json")
    }
    for sidecar, stage in zip(sidecars, bundle.parts, strict=True):
        data = engine_path(tmp_path / "e", stage.name).read_bytes()
        assert sidecar.engine_sha256 == hashlib.sha256(data).hexdigest()
        assert sidecar.engine_bytes == len(data)
        assert sidecar == Sidecar.load(sidecar_path(tmp_path / "e", stage.name))
        origin, files = sidecar.origin, bundle.manifest["files"]
        assert origin.model_sha256 == files[stage.model]["sha256"]
        assert origin.weights_sha256 == files[f"{stage.model}.data"]["sha256"]
        assert (origin.module, origin.compute_capability) == ("tensorrt_rtx", "sm_89")
        assert (origin.bundle_digest, origin.gpu, origin.level) == (bundle.digest, None, 1)
        assert sidecar.layers is None and "no GPU" in str(sidecar.layers_missing)


def test_shapes_pass_from_stage_to_stage(bundle: Bundle, tmp_path: Path) -> None:
    """Tokens = 4 patches + prompt + 1 state; the head's profile follows from the prompt's."""
    sidecars = build(bundle, tmp_path, prompt=PromptRange(3, 8, 16))
    _, decoder, head = sidecars
    hidden = ShapeRange((1, 8, 32), (1, 13, 32), (1, 21, 32))
    assert decoder.origin.inputs["input_ids"] == ShapeRange((1, 3), (1, 8), (1, 16))
    assert decoder.outputs == {"hidden": hidden} == head.origin.inputs
    assert head.outputs["actions"] == ShapeRange((1, 4, 4), (1, 4, 4), (1, 4, 4))


def test_one_prompt_length_only(bundle: Bundle, tmp_path: Path) -> None:
    """The graph's own size stays open, so that it needs a profile all the same."""
    _, decoder, head = build(bundle, tmp_path, prompt=PromptRange(8, 8, 8))
    assert decoder.origin.inputs["input_ids"] == ShapeRange((1, 8), (1, 8), (1, 8))
    assert head.origin.inputs["hidden"] == ShapeRange((1, 13, 32), (1, 13, 32), (1, 13, 32))


def test_what_is_up_to_date_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    first = build(bundle, tmp_path)
    again = Watch()
    assert build(bundle, tmp_path, again) == first
    assert not again.stages
    # A damaged engine and one that depends on another prompt are built anew, the rest is kept.
    engine_path(tmp_path, "head").write_bytes(b"damaged")
    mended = Watch()
    assert build(bundle, tmp_path, mended) == first
    assert mended.stages == ["head"]
    longer = Watch()
    build(bundle, tmp_path, longer, prompt=PromptRange(2, 32, 300))
    assert longer.stages == ["decoder", "head"]


def test_builds_repeat_but_for_what_the_builder_arranges(bundle: Bundle, tmp_path: Path) -> None:
    """TensorRT-RTX gives the same bytes on an idle machine; under load once in a while not."""
    first, second = build(bundle, tmp_path / "a"), build(bundle, tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert (one.origin, one.outputs) == (other.origin, other.outputs)
        assert one.weights_bytes == other.weights_bytes
        assert abs(one.engine_bytes - other.engine_bytes) < 0.02 * one.engine_bytes


def test_an_interrupted_build_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(bundle, tmp_path, Watch(interrupt="decoder"))
    assert [p.name for p in sorted(tmp_path.iterdir()) if p.suffix] == [
        "vision.engine",
        "vision.json",
    ]
    rest = Watch()
    build(bundle, tmp_path, rest)
    assert rest.stages == ["decoder", "head"]


def test_a_killed_build_is_reported(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".decoder.building").write_text('{"pid": 999999999}')
    with caplog.at_level(logging.WARNING):
        build(bundle, tmp_path)
    (message,) = [r.message for r in caplog.records]
    assert "previous build of part 'decoder' was killed" in message
    assert "--workspace-mb" in message
    assert not list(tmp_path.glob(".*"))


def flipped(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle whose weights have another lowest bit in every byte, or in every half byte."""
    folder.mkdir()
    for path in bundle.path.iterdir():
        data = path.read_bytes()
        if path.name.endswith(".onnx.data"):
            data = (np.frombuffer(data, np.uint8) ^ 0x11).tobytes()
        (folder / path.name).write_bytes(data)
    return replace(bundle, path=folder)


def quantized(seed: int) -> ir.Model:
    """x [1, 6, 28, 28] -> three layers of 4-bit blocks, 8 bits and 16 bits."""
    graph = PartGraph(seed)
    random = np.random.default_rng(seed)
    x = ir.val("pixel_values", ir.DataType.FLOAT, (1, 6, 28, 28))
    y = graph.op("Reshape", [x, graph.ints("shape", 21, 224)])
    y = graph.op("Cast", [y], to=ir.DataType.FLOAT16)

    def layer(y: ir.Value, codes: Any, scales: Any, **attributes: int) -> ir.Value:
        stored = [
            graph.tape.initializer(ir.Tensor(value, name=f"{name}{len(codes)}"))
            for name, value in (("codes", codes), ("scales", scales.astype(np.float16)))
        ]
        return graph.op("MatMul", [y, graph.op("DequantizeLinear", stored, **attributes)])

    codes = random.integers(-7, 8, (224, 512)).astype(ml_dtypes.int4)
    y = layer(y, codes, random.uniform(0.01, 0.1, (7, 512)), axis=0, block_size=32)
    codes = random.integers(-99, 99, (512, 768), np.int8)
    y = layer(y, codes, random.uniform(0.001, 0.01, 768), axis=1)
    y = graph.op("MatMul", [y, graph.weights("plain", 768, 256)])
    y = graph.op("Cast", [y], to=ir.DataType.FLOAT)
    y.shape = ir.Shape((21, 256))
    return graph.model([x], y, "y", ir.DataType.FLOAT)


def test_weight_bytes_are_those_that_follow_the_weights(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    """What the builder says an engine's weights take is what changes when every weight does."""
    bundle = bundle_of_parts(
        tiny_policy, tiny_observations(1), tmp_path / "b", parts={"policy": quantized}
    )
    (plain,) = build(bundle, tmp_path / "plain")
    (other,) = build(flipped(bundle, tmp_path / "other-bundle"), tmp_path / "other")
    a, b = (
        np.frombuffer(engine_path(tmp_path / n, "policy").read_bytes(), np.uint8)
        for n in ("plain", "other")
    )
    assert len(a) == len(b) == plain.engine_bytes == other.engine_bytes
    stored = 224 * 512 // 2 + 7 * 512 * 2 + 512 * 768 + 768 * 2 + 768 * 256 * 2
    changed = int((a != b).sum())
    assert changed == stored
    assert stored <= plain.weights_bytes <= stored + 2048


@pytest.fixture
def refusals(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> Iterator[Callable[[Callable[[int], ir.Model]], None]]:
    def attempt(make: Callable[[int], ir.Model]) -> None:
        bundle = bundle_of_parts(
            tiny_policy, tiny_observations(1), tmp_path / "b", parts={"policy": make}
        )
        build(bundle, tmp_path / "e")

    yield attempt
    assert not list((tmp_path / "e").iterdir()), "a refused stage leaves nothing behind"


def test_a_refused_node_is_named(refusals: Any) -> None:
    def unknown_operator(seed: int) -> ir.Model:
        graph = PartGraph(seed)
        x = ir.val("pixel_values", ir.DataType.FLOAT, (1, 6, 28, 28))
        y = graph.tape.op("Det", [x], name="determinant")
        y.shape = ir.Shape((1, 6))
        return graph.model([x], y, "y", ir.DataType.FLOAT)

    with pytest.raises(BuildError, match=r"node 'determinant' \(Det\): UNSUPPORTED_NODE") as error:
        refusals(unknown_operator)
    assert "qvla check --target rtx4070" in str(error.value)


def test_sizes_that_depend_on_values_are_refused(refusals: Any) -> None:
    def ranged(seed: int) -> ir.Model:
        graph = PartGraph(seed)
        ids = ir.val("input_ids", ir.DataType.INT64, (1, "prompt"))
        last = graph.op("ReduceMax", [ids], keepdims=0)
        counted = graph.op("Range", [graph.ints("start", 0), last, graph.ints("step", 1)])
        y = graph.op("Cast", [counted], to=ir.DataType.FLOAT)
        y.shape = ir.Shape(("found",))
        return graph.model([ids], y, "y", ir.DataType.FLOAT)

    with pytest.raises(BuildError, match="'y' depends on values"):
        refusals(ranged)


def test_a_cpu_target_has_nothing_to_build(bundle: Bundle, tmp_path: Path) -> None:
    manifest = {**bundle.manifest, "target": "cpu"}
    with pytest.raises(BuildError, match="'cpu' runs the bundle itself with ort"):
        build(replace(bundle, manifest=manifest), tmp_path)


@pytest.mark.parametrize("lengths", [(0, 1, 2), (3, 2, 4), (1, 5, 4)])
def test_prompt_lengths_must_be_ordered(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(BuildError, match="1 <= min <= opt <= max"):
        PromptRange(*lengths)


@pytest.mark.parametrize("bad", [{"level": 6}, {"level": -1}, {"workspace_bytes": 5}])
def test_bad_settings(bad: dict[str, int]) -> None:
    with pytest.raises(BuildError, match="must be"):
        BuildSettings(**bad)
