"""AI2's harness itself drives `qvla serve`: make vla-eval-env, or name its environment in VLA_EVAL.

Neither is changed: the harness runs as its command does, on a benchmark of `vla_eval_benchmark`,
against the server's command with a real bundle.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from places import HELPERS, ROOT
from ports import free_port

from engines.load import load_engine
from engines.targets import find_target
from jetson.policy import EnginePolicy
from qvla_export.graph.export import export_bundle
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation

FOLDER = Path(os.environ.get("VLA_EVAL", ROOT / ".vla-eval"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (FOLDER / "bin" / "vla-eval").is_file(),
        reason=f"no vla-eval at {FOLDER.name}: make vla-eval-env",
    ),
]
TOKEN = "a-token-that-is-not-guessed"
STEPS, INSTRUCTION = 10, "push the button"


def seen_at(step: int) -> Observation:
    """Return what `vla_eval_benchmark` shows at a step, which imports the harness."""
    generator = np.random.default_rng(step)
    picture = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    state = generator.uniform(-1, 1, 4).astype(np.float32)
    return Observation({"image": picture}, INSTRUCTION, state)


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("served") / "bundle"
    export_bundle(tiny_policy, None, find_target("cpu"), tiny_observations(2), path)
    return path


@pytest.fixture(scope="module")
def chunks(bundle: Path) -> list[np.ndarray[Any, Any]]:
    """What the policy does at each step, float32 [4, 4] each."""
    with load_engine(Bundle.load(bundle), threads=1) as engine:
        policy = EnginePolicy(Bundle.load(bundle), engine)
        return [policy.infer(seen_at(step)).actions for step in range(STEPS * 10)]


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    """Host and port of `qvla serve`."""
    port = free_port()
    words = ["-m", "qvla_export", "serve", bundle, "--port", port, "--threads", 1]
    words += ["--camera-alias", "full_image=agentview"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "QVLA_TOKEN": TOKEN}
    server = subprocess.Popen([sys.executable, *map(str, words)], env=environment)
    try:
        for _ in range(1200):
            assert server.poll() is None
            try:
                if requests.get(f"http://127.0.0.1:{port}/readyz", timeout=20).ok:
                    break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        assert server.wait(60) == 0


def run_harness(folder: Path, address: str, query: str, **benchmark: Any) -> list[dict[str, Any]]:
    """Run `vla-eval run`; return what the benchmark wrote."""
    log = folder / "log.jsonl"
    configuration = {
        "server": {"url": f"ws://harness:{TOKEN}@{address}/vla-eval{query}", "timeout": 60},
        "output_dir": str(folder / "results"),
        "benchmarks": [
            {
                "benchmark": "vla_eval_benchmark:RecordedBenchmark",
                "params": {"log": str(log)},
                **benchmark,
            }
        ],
    }
    path = folder / "evaluation.yaml"
    path.write_text(json.dumps(configuration))  # JSON is YAML
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    words = [FOLDER / "bin" / "vla-eval", "run", "--config", path, "--no-docker"]
    run = subprocess.run(
        list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "RecordedBenchmark: 100.0%" in run.stdout, run.stdout + run.stderr
    assert "errored" not in run.stdout
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(("query", "execute"), [("", 4), ("?execute=3", 3), ("?execute=1", 1)])
def test_episodes_run_and_every_action_is_the_policy_s(
    tmp_path: Path, address: str, chunks: list[np.ndarray[Any, Any]], query: str, execute: int
) -> None:
    rows = run_harness(tmp_path, address, query, episodes_per_task=2)
    starts = [row for row in rows if "reset" in row]
    # What the server said it needs reached the benchmark.
    assert starts == [{"reset": INSTRUCTION, "send_state": True}] * 2
    expected = [chunks[step - step % execute][step % execute] for step in range(STEPS)]
    taken = [row for row in rows if "step" in row]
    assert [row["step"] for row in taken] == [*range(STEPS)] * 2
    np.testing.assert_array_equal([row["action"] for row in taken], [*expected, *expected])


@pytest.mark.parametrize(
    ("least", "clock"), [(1, {"paced": False, "wait_first_action": True}), (5, {"hz": 20.0})]
)
def test_live_episodes_take_the_policy_s_actions_as_they_come(
    tmp_path: Path,
    address: str,
    chunks: list[np.ndarray[Any, Any]],
    least: int,
    clock: dict[str, Any],
) -> None:
    params = {"log": str(tmp_path / "log.jsonl"), "steps": 40}
    rows = run_harness(tmp_path, address, "", mode="live", params=params, **clock)
    taken = np.array([row["action"] for row in rows if "step" in row], np.float32)
    assert len(taken) == 40
    fresh = taken[(taken != 7.0).any(axis=1)]
    # Replies come in the order of observations; only the last of those that came is executed.
    handed_out = [chunks[step - step % 4][step % 4] for step in range(41)]
    places = [[i for i, a in enumerate(handed_out) if np.array_equal(a, b)] for b in fresh]
    assert len(places) >= least and all(len(place) == 1 for place in places)
    assert places == sorted(places)
