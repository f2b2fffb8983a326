"""The public surface: ten lines from a checkpoint to acting, errors a program can catch."""

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import Inputs
from house import tree_of
from places import ROOT

import qvla_export as qvla
from qvla_export.shared.observation import Observation


def test_every_public_name_is_there_and_documented() -> None:
    assert list(qvla.__all__) == sorted(qvla.__all__)
    for name in qvla.__all__:
        value = getattr(qvla, name)
        assert inspect.getdoc(value), f"{name} says nothing of itself"
    assert set(qvla.__all__) <= set(dir(qvla))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qvla.quantise


def test_what_a_type_checker_sees_is_what_a_program_gets() -> None:
    typed = {
        alias.asname: str(node.module)
        for block in tree_of("qvla_export").body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(typed) == set(qvla.__all__)
    for name, module in typed.items():
        assert getattr(qvla, name).__module__ == module


def test_importing_the_library_imports_nothing_heavy() -> None:
    code = (
        "import sys, qvla_export as q; q.Observation, q.Bundle, q.open_bundle, q.QvlaError; "
        "print(sorted({'torch', 'transformers', 'onnx', 'mujoco'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def observations(inputs: Inputs) -> qvla.CalibrationSet:
    return qvla.CalibrationSet.from_dataset(
        inputs.dataset, cameras={"image": "observation.images.image"}, count=4, held_out=2
    )


@pytest.fixture(scope="module")
def quantized(
    inputs: Inputs,
    observations: qvla.CalibrationSet,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[qvla.QuantizationResult, list[qvla.Progress]]:
    steps: list[qvla.Progress] = []
    run = tmp_path_factory.mktemp("library") / "run"
    policy = qvla.load_policy(inputs.checkpoint)
    result = qvla.quantize(policy, observations, run=run, bits=4, on_progress=steps.append)
    return result, steps


def test_ten_lines_quantize_and_act(
    quantized: tuple[qvla.QuantizationResult, list[qvla.Progress]],
    observations: qvla.CalibrationSet,
) -> None:
    result, steps = quantized
    assert result.plan.mean_bits_per_channel <= 4
    assert 0 < result.action_error.rms < 1
    with qvla.open_bundle(result.bundle) as robot:
        chunk = robot.infer(observations.held_out[0])
    assert np.isfinite(chunk.actions).all()
    numbers = [(p.step, p.steps) for p in steps if p.state == "made"]
    assert numbers == [(1, 3), (2, 3), (3, 3)]


def test_a_second_call_keeps_what_is_up_to_date(
    inputs: Inputs,
    quantized: tuple[qvla.QuantizationResult, list[qvla.Progress]],
    observations: qvla.CalibrationSet,
) -> None:
    first, _ = quantized
    steps: list[qvla.Progress] = []
    policy, run = qvla.load_policy(inputs.checkpoint), first.run.root
    again = qvla.quantize(policy, observations, run=run, bits=4, on_progress=steps.append)
    assert again.bundle.digest == first.bundle.digest
    assert [p.work for p in steps if p.state == "kept"][:2] == [
        "calibration",
        "sensitivities of every channel and width",
    ]
    other = qvla.CalibrationSet(observations.held_out, observations.observations, {})
    with pytest.raises(qvla.ArtifactMismatch, match="Name another run folder"):
        qvla.quantize(policy, other, run=run, bits=4)


def test_nouns_print_one_line(
    quantized: tuple[qvla.QuantizationResult, list[qvla.Progress]],
    observations: qvla.CalibrationSet,
) -> None:
    result, _ = quantized
    with qvla.open_bundle(result.bundle) as robot:
        chunk = robot.infer(observations.held_out[0])
    nouns: list[Any] = [observations, observations.held_out[0], chunk, result, result.bundle]
    nouns += [result.action_error, result.sensitivities, result.plan]
    for noun in nouns:
        assert len(repr(noun)) < 250 and "\n" not in repr(noun), repr(noun)[:400]


def blank(camera: str) -> Observation:
    return Observation({camera: np.zeros((28, 28, 3), np.uint8)}, "push", np.zeros(4, np.float32))


WRONG: dict[str, Callable[[Inputs, Path], Any]] = {
    "no checkpoint there": lambda i, p: qvla.load_policy(p / "none"),
    "no checkpoint in it": lambda i, p: qvla.load_policy(p),
    "an unknown preset": lambda i, p: qvla.load_policy(i.checkpoint, preset="moon"),
    "an unknown key": lambda i, p: qvla.load_policy(i.checkpoint, unnorm_key="moon"),
    "no data set": lambda i, p: qvla.CalibrationSet.from_dataset(p, cameras={"image": "x"}),
    "an unknown column": lambda i, p: qvla.CalibrationSet.from_dataset(
        i.dataset, cameras={"image": "observation.images.moon"}
    ),
    "no such task": lambda i, p: qvla.CalibrationSet.from_simulator(["moon"]),
    "no bundle": lambda i, p: qvla.open_bundle(p),
    "no server": lambda i, p: qvla.RemotePolicy("http://127.0.0.1:9"),
    "no URL": lambda i, p: qvla.RemotePolicy("127.0.0.1"),
    "no run": lambda i, p: qvla.write_report(p / "none"),
    "no such setting": lambda i, p: qvla.parse_setting("w4-moon"),
    "no such target": lambda i, p: qvla.find_target("moon"),
    "another policy's cameras": lambda i, p: qvla.quantize(
        qvla.load_policy(i.checkpoint),
        qvla.CalibrationSet((blank("moon"),), (blank("moon"),), {}),
        run=p / "run",
    ),
    "no bits": lambda i, p: qvla.quantize(
        qvla.load_policy(i.checkpoint),
        qvla.CalibrationSet((blank("image"),), (blank("image"),), {}),
        run=p / "run",
        bits=-1,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_goes_wrong_is_a_qvla_error(wrong: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(qvla.QvlaError) as refusal:
        WRONG[wrong](inputs, tmp_path)
    assert len(str(refusal.value)) > 20


def test_a_missing_library_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import qvla_export as qvla\n"
        "try: qvla.load_policy(sys.argv[1])\n"
        "except qvla.QvlaError as error: print(error)"
    )
    checkpoint = ROOT / "checkpoints" / "reference"
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "needs torch: pip install 'qvla[host]'" in done.stdout
