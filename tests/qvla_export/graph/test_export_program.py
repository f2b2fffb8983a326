"""A policy that decodes: its two graphs, run as the program says, are torch's tokens."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from command_runs import qvla
from graph_checks import require_clean
from openvla_cases import (
    CASES,
    Case,
    load_openvla_policy,
    openvla_observations,
    write_tiny_openvla,
)
from rtx_parser import builds
from tiny_bundles import exported_oracle, mixed_plan
from traced_graphs import traced

from calibration.calibration_set import CalibrationSet
from engines.ort import OrtEngine
from engines.targets import CPU, find_target
from engines.verify import judge
from qvla_export.allocation.setting import parse_setting
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.pipeline.export import export
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.openvla.policy import OpenVlaPolicy
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.program import PartRuns, run_program


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> OpenVlaPolicy:
    return load_openvla_policy(write_tiny_openvla(tmp_path_factory.mktemp("tiny") / "checkpoint"))


@pytest.fixture(scope="module")
def bundles(
    policy: OpenVlaPolicy, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """A float and a quantized bundle of the same graphs."""
    options = ExportOptions(traced(policy, CPU))
    folder, seen = tmp_path_factory.mktemp("bundles"), openvla_observations(3)
    whole = export_bundle(policy, None, CPU, seen, folder / "float", options)
    mixed = export_bundle(policy, mixed_plan(policy), CPU, seen, folder / "mixed", options)
    for bundle in (whole, mixed):
        require_clean(bundle)
    return whole, mixed


def test_an_engine_chooses_torchs_tokens(bundles: tuple[Bundle, Bundle]) -> None:
    for bundle in bundles:
        with OrtEngine(bundle, threads=1) as engine:
            verdict = judge(bundle, engine)
            assert verdict.passed
            assert verdict.drift.flipped is not None and not verdict.drift.flipped.any()
            assert engine.part_calls == {"prefix": 1, "prefill": 1, "decode": 6}


def test_the_decoder_is_stored_once(bundles: tuple[Bundle, Bundle], policy: OpenVlaPolicy) -> None:
    """One graph for the prompt and for every token: no weight has a second copy."""
    whole, mixed = bundles
    assert [part.name for part in whole.parts] == ["prefix", "decoder"]
    assert whole.program.calls == {"prefix": 1, "decoder": 7}
    read = sum(weight.numel() for weight in policy.module.parameters())
    stored = sum(whole.weight_bytes.values())
    assert stored < 2 * 1.02 * read  # of 16 bits, and a few constants
    layers = sum(layer.weight.numel() for layer in policy.layers().values())
    coded = sum(mixed.weight_bytes[bits] for bits in ("2", "4", "8", "16"))
    assert coded < 2 * layers


def test_sizes_show_shared_bytes_once(
    bundles: tuple[Bundle, Bundle], policy: OpenVlaPolicy
) -> None:
    """What prefill and decode share is counted once, as it is stored."""
    shown = qvla("sizes", *(bundle.path for bundle in bundles), "--json")
    assert shown.code == 0, shown.err
    printed = qvla("sizes", *(bundle.path for bundle in bundles)).out
    for bundle, told in zip(bundles, json.loads(shown.out)["bundles"], strict=True):
        runs = {run.name: run.parts for run in bundle.program.runs}
        assert runs["prefill"] == runs["decode"] == ("decoder",)
        stored = {part.name: stored_bytes(bundle.model_path(part)) for part in bundle.parts}
        assert told["onnx_bytes"] == pytest.approx(sum(stored.values()), rel=0.02)
        assert f"{told['onnx_bytes'] / 1e6:.3f}" in printed
        # Far more than the tolerance: a second copy would be seen.
        assert stored["decoder"] > 0.04 * told["onnx_bytes"]
    language = policy.module.language_model
    weights = [
        weight.numel()
        for module in (language.model.layers, language.model.norm, language.lm_head)
        for weight in module.parameters()
    ]
    # Of 16 bits, each once; what runs twice is in one file.
    assert stored_bytes(bundles[0].model_path(bundles[0].parts[1])) == pytest.approx(
        2 * sum(weights), rel=0.1
    )


def stored_bytes(path: Path) -> int:
    """Return the bytes of a graph's constants."""
    values = ir.load(path).graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def test_every_parts_outputs_are_torchs(
    bundles: tuple[Bundle, Bundle], policy: OpenVlaPolicy
) -> None:
    """Keys, values, embeddings and actions of every call, to 1e-3."""
    bundle = bundles[0]
    sessions = {
        part.name: onnxruntime.InferenceSession(str(bundle.model_path(part)))
        for part in bundle.parts
    }
    modules = {part.name: part for part in policy.parts()}
    compared = []

    def call(run: PartRuns, name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        part = modules[name]
        with torch.no_grad():
            outputs = part.module(*(inputs[source] for source in part.inputs))
        got = sessions[name].run(
            list(part.outputs), {source: inputs[source].numpy() for source in part.inputs}
        )
        for expected, found in zip(outputs, got, strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-3)
            compared.append(name)
        return dict(zip(part.outputs, outputs, strict=True))

    feeds = {name: torch.from_numpy(value) for name, value in bundle.golden().feeds[1].items()}
    values = run_program(bundle.program, bundle.reads, feeds, call)
    np.testing.assert_array_equal(values["actions"][0].numpy(), bundle.golden().reference[1])
    assert set(compared) == set(modules)


@pytest.mark.slow
@pytest.mark.parametrize("layers_per_part", [None, 1])
def test_oracle_cases_through_the_engine(tmp_path: Path, layers_per_part: int | None) -> None:
    """Upstream's tokens come out of ONNX Runtime, from whole graphs and from cut ones."""
    cases = [Case(path) for path in CASES if path.parent == CASES[0].parent]
    donor = load_openvla_policy(write_tiny_openvla(tmp_path / "donor"))
    bundle = exported_oracle(cases[0].policy, donor, tmp_path / "b", layers_per_part)
    with OrtEngine(bundle, threads=1) as engine:
        for case in cases:
            feeds = {
                "pixel_values": case.golden["pixel_values"],
                "input_ids": case.golden["input_ids_with_29871"],
            }
            actions = engine.infer(feeds)["actions"][0, 0]
            np.testing.assert_allclose(
                actions, case.golden["normalized_actions"], rtol=0, atol=1e-6
            )


@pytest.mark.slow
def test_weights_left_on_disk_export_the_same_bundle(
    policy: OpenVlaPolicy, bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    checkpoint = write_tiny_openvla(tmp_path / "checkpoint")
    stored = load_openvla_policy(checkpoint, resident=False)
    bundle = export_bundle(
        stored,
        mixed_plan(stored),
        CPU,
        openvla_observations(3),
        tmp_path / "b",
        ExportOptions(layers_per_part=1),
    )
    with OrtEngine(bundle, threads=1, keep_loaded=False) as engine:
        assert judge(bundle, engine).passed
    golden, whole = bundle.golden(), bundles[1].golden()
    np.testing.assert_array_equal(golden.reference, whole.reference)
    np.testing.assert_array_equal(golden.full_precision, whole.full_precision)


@pytest.mark.slow
def test_few_observations_hold_caches_where_weights_are_on_disk(tmp_path: Path) -> None:
    stored = load_openvla_policy(write_tiny_openvla(tmp_path / "checkpoint"), resident=False)
    drawn = tuple(openvla_observations(4))
    run, setting = RunFolder(tmp_path / "run"), parse_setting("float")
    CalibrationSet(drawn[:1], drawn[1:], {"test": 1}).save(run.calibration)
    bundle = export(run, setting, stored, CPU, layers_per_part=1)
    assert len(bundle.golden().feeds) == 2
    before = bundle.path.stat().st_mtime_ns
    assert export(run, setting, stored, CPU, layers_per_part=1).path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_tensorrt_targets_take_every_part(policy: OpenVlaPolicy, tmp_path: Path) -> None:
    target = find_target("rtx4070")
    options = ExportOptions(traced(policy, target))
    seen = openvla_observations(2)
    base = uniform_plan(layer_shapes(policy.layers()), 4, target, policy.digest)
    mixed = replace(base, widths=mixed_plan(policy).widths)
    for name, plan in (("float", None), ("mixed", mixed)):
        bundle = export_bundle(policy, plan, target, seen, tmp_path / name, options)
        for checked in ("rtx4070", "orin-jp7", "orin-jp6"):
            require_clean(bundle, find_target(checked))
        prefix, decoder = bundle.parts
        assert builds(bundle.model_path(prefix), [{"input_ids": 20}])
        # One engine for both: 20 tokens behind 4 patches, then one at a time with room for 6 more.
        caches = {spec.name: 30 for spec in decoder.inputs if "room" in spec.shape}
        both = [{**caches, "hidden": rows} for rows in (24, 1)]
        assert builds(bundle.model_path(decoder), both)
