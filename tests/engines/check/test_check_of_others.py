"""Graphs of other tools: for the RTX 4070 an error is what its parser and builder refuse."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from graphs_of_others import FOREIGN, Foreign
from places import HELPERS, ROOT
from rtx_parser import builds

from engines.check.bundle import check_graph, check_model
from engines.check.finding import errors
from engines.check.model import of_model
from engines.targets import TARGETS, find_target

# Beside the checkout where its reference data lies; nothing here needs it.
REPORTED = ROOT.parent / "shared" / "cases" / "20-qdq"
RTX = find_target("rtx4070")


def name(graph: Foreign) -> str:
    return graph.name


@pytest.mark.parametrize("graph", FOREIGN, ids=name)
def test_an_error_is_what_the_runtime_refuses(graph: Foreign) -> None:
    found = check_graph(of_model(graph.model(), "case"), RTX)
    assert not errors(found) if graph.is_built else errors(found)


@pytest.mark.parametrize("graph", FOREIGN, ids=name)
def test_the_runtime_still_refuses_the_same_ones(graph: Foreign, tmp_path: Path) -> None:
    ir.save(graph.model(), tmp_path / "case.onnx")
    assert builds(tmp_path / "case.onnx") == graph.is_built


@pytest.mark.parametrize("target", ["orin-jp7", "orin-jp6"])
def test_documented_rules_stay_errors_where_nothing_can_be_built(target: str) -> None:
    wrong = {
        graph.name
        for graph in FOREIGN
        if errors(check_graph(of_model(graph.model(), "case"), find_target(target)))
    }
    documented = {
        "int4, blocks of 128, float16",
        # Each of their operators is in the parser's table of 10.1.
        "rare functions",
        "rare operators of pictures",
    }
    assert wrong == {graph.name for graph in FOREIGN} - documented


def test_a_warning_says_that_it_is_built_all_the_same() -> None:
    graph = next(graph for graph in FOREIGN if graph.name == "fp8")
    found = {f.rule: f for f in check_graph(of_model(graph.model(), "case"), RTX)}
    assert "TensorRT-RTX 1.7.1 builds it all the same" in found["type.missing"].message
    assert "all the same" not in found["type.compute"].message


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_weights_that_are_missing_are_an_error(target: str, cut: bool, tmp_path: Path) -> None:
    path = tmp_path / "case.onnx"
    ir.save(FOREIGN[0].model(), path, external_data="weights.bin", size_threshold_bytes=0)
    assert "graph.weights" not in {f.rule for f in check_model(path, TARGETS[target])}
    weights = tmp_path / "weights.bin"
    if cut:
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.unlink()
    found = check_model(path, TARGETS[target])
    assert {(f.rule, f.severity) for f in found} == {("graph.weights", "error")}
    assert "weights.bin" in found[0].message


@pytest.mark.skipif(not REPORTED.is_dir(), reason="no cases beside the checkout")
def test_the_reported_files_themselves(tmp_path: Path) -> None:
    paths = sorted(REPORTED.glob("*.onnx"))
    assert len(paths) == 30
    for path in paths:
        assert bool(errors(check_model(path, RTX))) == (not builds(path)), path.name


def attention(path: Path, *shapes: tuple[int, ...]) -> Path:
    tape = ir.tape.Tape()
    inputs = [ir.val(name, ir.DataType.FLOAT, s) for name, s in zip("qkv", shapes, strict=True)]
    output = tape.op("Attention", inputs, name="attention")
    output.name, output.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(inputs, [output], nodes=tape.nodes, opset_imports={"": 23}, name="g")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def ends_in_the_parser(path: Path) -> int:
    """Parse in a process of its own; return how that ended, negative for a signal."""
    script = (
        "import sys; from pathlib import Path; from rtx_parser import parses\n"
        "sys.exit(0 if parses(Path(sys.argv[1])) else 3)"
    )
    helpers = os.pathsep.join([str(ROOT), str(HELPERS)])
    environment = {**os.environ, "PYTHONPATH": helpers}
    command = [sys.executable, "-W", "ignore", "-c", script, str(path)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def test_attention_that_ends_the_parser_s_process_is_an_error(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 runs into a segmentation fault where queries are scalars."""
    pytest.importorskip("tensorrt_rtx")
    path = attention(tmp_path / "scalar.onnx", (), (), ())
    assert ends_in_the_parser(path) == -signal.SIGSEGV
    found = errors(check_model(path, RTX))
    assert [finding.rule for finding in found] == ["operator.limit"]
    assert "crashes" in found[0].message


@pytest.mark.parametrize(
    ("shapes", "is_parsed"),
    [
        (((1, 4, 8, 16),) * 3, True),
        (((8, 16),) * 3, False),
        (((1, 1, 4, 8, 16),) * 3, False),
        (((1, 4, 8, 16), (1, 8, 64), (1, 8, 64)), False),
    ],
)
def test_attention_s_dimensions(
    shapes: tuple[tuple[int, ...], ...], is_parsed: bool, tmp_path: Path
) -> None:
    path = attention(tmp_path / "case.onnx", *shapes)
    rules = {finding.rule for finding in errors(check_model(path, RTX))}
    assert ("operator.limit" not in rules) == is_parsed
