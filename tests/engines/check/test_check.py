"""A graph wrong in one way is rejected by that rule; right graphs and our bundles pass."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from graph_checks import require_clean
from hypothesis import given
from hypothesis import strategies as st
from rtx_parser import builds, parses
from small_graphs import BLOCK, Graph, int4, model
from tiny_bundles import float_graph, make_bundle, mixed_plan
from typer.testing import CliRunner
from wrong_graphs import CASES, Case

from engines.check.bundle import check_bundle, check_graph, check_model
from engines.check.finding import CheckFailed, GraphFinding, errors, require_no_errors
from engines.check.model import of_model
from engines.check.operators import OPERATORS, UNSUPPORTED
from engines.check.rules import RULES
from engines.check.runtimes import READERS, oldest_version, reader
from engines.targets import CPU, TARGETS, find_target
from qvla_export.cli.app import app
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation

TENSORRT = ("rtx4070", "orin-jp7", "orin-jp6")
# Rules whose wrong graphs are made below.
OF_BUNDLES = {"bundle.target", "bundle.contract", "graph.constant-shape", "graph.weights"}


def check(graph: ir.Model, target: str) -> tuple[GraphFinding, ...]:
    return check_graph(of_model(graph, "case"), find_target(target))


def ids(case: Case) -> str:
    return f"{case.rule}-{case.target}"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_wrong_graph_is_rejected_by_its_rule(case: Case) -> None:
    found = check(case.model(), case.target)
    if case.target == "rtx4070" and case.parser == "accepts":
        assert not errors(found) and case.rule in {finding.rule for finding in found}
    else:
        serious = errors(found) if RULES[case.rule].severity == "error" else found
        assert {finding.rule for finding in serious} == {case.rule}
    assert all(finding.part == "case" and len(finding.message) > 20 for finding in found)


def test_every_rule_has_a_wrong_graph_and_a_source() -> None:
    assert {case.rule for case in CASES} | OF_BUNDLES == set(RULES)
    assert all(len(rule.source) > 20 for rule in RULES.values())
    assert all(len(operator.source) > 20 for operator in OPERATORS.values())
    assert all(limit.source for operator in OPERATORS.values() for limit in operator.limits)


@pytest.mark.parametrize("case", [c for c in CASES if c.parser != "not tried"], ids=ids)
def test_what_the_real_parser_and_builder_say(case: Case, tmp_path: Path) -> None:
    """For the RTX 4070 an error is what they refuse, no more and no less."""
    ir.save(case.model(), tmp_path / "case.onnx")
    assert ("accepts" if builds(tmp_path / "case.onnx") else "rejects") == case.parser
    assert bool(errors(check(case.model(), "rtx4070"))) == (case.parser == "rejects")


def test_the_real_parser_has_the_operators_of_the_table() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    parser = trt.OnnxParser(builder.create_network(0), builder.logger)
    assert not [name for name in OPERATORS if not parser.supports_operator(name)]
    assert not [name for name in UNSUPPORTED if parser.supports_operator(name)]


def w8a8(g: Graph, inputs: int, channels: int) -> ir.Value:
    return g.w8a8(g.codes(inputs, channels), g.scales(channels))


def w4(g: Graph, inputs: int, channels: int) -> ir.Value:
    return g.w4(int4(g, inputs, channels), g.scales(inputs // BLOCK, channels))


def with_zero_points(g: Graph, inputs: int, channels: int) -> ir.Value:
    zero = g.const(np.zeros((inputs // BLOCK, channels), ml_dtypes.int4))
    return g.w4(int4(g, inputs, channels), g.scales(inputs // BLOCK, channels), zero)


def cast_scale(g: Graph, inputs: int, channels: int) -> ir.Value:
    scale = g.op("Cast", g.scales(channels, dtype=np.float32), to=ir.DataType.FLOAT16)
    return g.w8a8(g.codes(inputs, channels), scale)


def mlp(g: Graph, inputs: int, channels: int) -> ir.Value:
    hidden = g.op("Gelu", g.op("Add", w4(g, inputs, channels), g.scales(channels)))
    joined = g.op("Concat", hidden, g.op("Relu", hidden), axis=-1)
    return g.op("Pad", joined, g.const(np.array([0, 1])), None, g.const(np.array([-1])))


@pytest.mark.parametrize("target", TENSORRT)
@pytest.mark.parametrize("build", [w8a8, w4, with_zero_points, cast_scale, mlp])
@given(blocks=st.integers(1, 3), pairs=st.integers(1, 40))
def test_a_right_graph_passes(
    build: Callable[..., Any], target: str, blocks: int, pairs: int
) -> None:
    inputs = blocks * BLOCK
    found = check(model(lambda g: build(g, inputs, 2 * pairs), inputs=inputs), target)
    # 10.3 documents operator sets up to 20 and reads 21, the first with int4.
    known = {"graph.opset-undocumented"} if target == "orin-jp6" else set()
    assert {finding.rule for finding in found} == known


@given(scales=st.integers(1, 40), channels=st.integers(1, 40))
def test_as_many_scales_as_channels(scales: int, channels: int) -> None:
    found = check(model(lambda g: g.w8a8(g.codes(256, channels), g.scales(scales))), "rtx4070")
    alone = scales == 1  # one scale a tensor, whatever its axis says
    assert ({f.rule for f in found} == {"quantization.scale-shape"}) == (
        scales != channels and not alone
    )


def test_findings_say_the_value_the_remedy_and_the_source() -> None:
    case = next(case for case in CASES if case.rule == "quantization.scale-values")
    (finding,) = check(case.model(), case.target)
    assert (finding.op, finding.severity) == ("DequantizeLinear", "error")
    assert "128 of 128 are not, the first is 0.0; give channels of zeros" in finding.message
    assert "NvInfer.h" in finding.source
    with pytest.raises(CheckFailed, match=r"1 errors of \['quantization.scale-values'\]"):
        require_no_errors([finding])


@given(st.data())
def test_no_graph_stops_the_check(data: st.DataObject) -> None:
    """Nodes with too few inputs, wrong types and senseless attributes give findings, not errors."""

    def build(g: Graph) -> ir.Value:
        values = [
            g.x,
            g.codes(4, 8),
            int4(g, 256, 6),
            g.scales(8),
            g.scales(),
            g.const(np.arange(2)),
        ]
        for _ in range(data.draw(st.integers(1, 4))):
            name = data.draw(st.sampled_from([*OPERATORS, "Det", "BitShift", "NoSuchOperator"]))
            inputs = data.draw(st.lists(st.sampled_from([None, *values]), max_size=4))
            keys = data.draw(st.sets(st.sampled_from(["axis", "block_size", "to", "transB"])))
            settings = {key: data.draw(st.integers(-3, 9)) for key in keys}
            values.append(g.op(name, *inputs, **settings))
        return values[-1]

    target = data.draw(st.sampled_from(sorted(TARGETS)))
    assert all(finding.rule in RULES for finding in check(model(build), target))


@pytest.mark.parametrize("settings", [{}, {"axis": 0}])
def test_a_constant_without_a_value_stops_no_check(settings: dict[str, int]) -> None:
    graph = model(lambda g: g.op("Add", g.x, g.op("Constant", **settings)))
    assert all(finding.rule in RULES for finding in check(graph, "rtx4070"))


def test_what_the_real_parser_rejects_is_found(tiny_policy: OftPolicy, tmp_path: Path) -> None:
    """One input of one node of a real policy gets another type, a dozen times."""
    path, generator = tmp_path / "cast.onnx", np.random.default_rng(0)
    other = [ir.DataType[name] for name in ("FLOAT16", "INT8", "INT32", "INT64", "BOOL")]
    rejected = 0
    for _ in range(12):
        changed = float_graph(tiny_policy).clone()
        node = generator.choice(np.array([n for n in changed.graph if n.inputs], object))
        index = int(generator.integers(len(node.inputs)))
        cast = ir.Node(
            "", "Cast", [node.inputs[index]], {"to": ir.AttrInt64("to", generator.choice(other))}
        )
        changed.graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
        ir.save(changed, path)
        if not parses(path):
            rejected += 1
            assert errors(check_model(path, find_target("rtx4070"))), (node, index, cast)
    assert rejected > 5


def test_a_constant_of_another_shape_than_stated() -> None:
    wrong = model(lambda g: g.op("Add", g.x, g.one()))
    wrong.graph.initializers["c0"].shape = ir.Shape([7])
    found = check(wrong, "rtx4070")
    assert [(finding.rule, finding.node) for finding in found] == [("graph.constant-shape", "c0")]


def test_only_the_first_untyped_node_is_reported() -> None:
    def build(g: Graph) -> ir.Value:
        return g.op("Relu", g.op("Relu", g.op("Concat", g.x, g.x)))

    found = check(model(build), "rtx4070")
    assert [(finding.rule, finding.op) for finding in found] == [("graph.untyped", "Concat")]


def test_each_target_has_a_reader_of_its_oldest_version() -> None:
    for target in TARGETS.values():
        assert reader(target) in READERS[target.runtime]
        assert reader(target).since <= oldest_version(target)
        assert target.opset <= reader(target).known_opset
        assert target.ir_version <= reader(target).ir_version


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x0a" * 40, None])
def test_what_is_no_graph(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        check_model(path, CPU)


@pytest.fixture(scope="module")
def mixed_bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("check") / "mixed"
    return make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(1), path)


def test_the_cpu_bundle_is_clean(mixed_bundle: Bundle) -> None:
    assert not require_clean(mixed_bundle)


def test_a_bundle_for_one_target_is_refused_for_another(mixed_bundle: Bundle) -> None:
    found = {finding.rule for finding in check_bundle(mixed_bundle, find_target("orin-jp7"))}
    assert {"bundle.target", "type.missing", "quantization.scale-type"} <= found
    with pytest.raises(CheckFailed, match="qvla export --target orin-jp7"):
        require_no_errors(check_bundle(mixed_bundle, find_target("orin-jp7")))


def test_a_graph_that_the_manifest_misstates(mixed_bundle: Bundle) -> None:
    stages = (replace(mixed_bundle.parts[0], inputs=()), *mixed_bundle.parts[1:])
    found = check_bundle(replace(mixed_bundle, parts=stages), CPU)
    assert [finding.rule for finding in found] == ["bundle.contract"]


def test_the_command(mixed_bundle: Bundle, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["check", str(mixed_bundle.path), "--target", "cpu"])
    assert run.exit_code == 0, run.output
    assert "0 errors, 0 warnings for target cpu" in run.output
    # A bundle states its target, a bare graph does not.
    assert CliRunner().invoke(app, ["check", str(mixed_bundle.path)]).output == run.output
    ir.save(CASES[0].model(), tmp_path / "case.onnx")
    bare = CliRunner().invoke(app, ["check", str(tmp_path / "case.onnx")])
    assert "name one: --target" in str(bare.exception)
    arguments = ["check", str(tmp_path / "case.onnx"), "--target", CASES[0].target]
    run = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "found.json")])
    assert run.exit_code == 2, run.output
    written = json.loads((tmp_path / "found.json").read_text())
    assert [finding["rule"] for finding in written["findings"]] == [CASES[0].rule]
    assert (written["errors"], written["findings"][0]["stage"]) == (1, "case")


def test_the_command_fails_on_warnings_if_strict(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.rule == "quantization.block-size")
    ir.save(case.model(), tmp_path / "case.onnx")
    arguments = ["check", str(tmp_path / "case.onnx"), "--target", "rtx4070"]
    codes = [CliRunner().invoke(app, [*arguments, *more]).exit_code for more in ([], ["--strict"])]
    assert codes == [0, 2]
