"""The server's benchmark measures what it says, all servers in one run."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from jetson.clients.bench_preprocessing import _SPEC, naive_pixel_values
from qvla_export.cli.app import app
from qvla_export.shared.images import pixel_values


@pytest.mark.timeout(120)
def test_every_server_answers_and_every_sample_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    options = ["--count", "3", "--side", "16", "--frames", "2", "--output", str(output)]
    done = CliRunner().invoke(app, ["bench", "server", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    bench = json.loads(output.read_text())
    assert set(bench["servers"]) == {
        "qvla websocket", "openpi structure", "qvla POST /act", "openvla structure", "qvla ZMQ",
    }  # fmt: skip
    for figures in bench["servers"].values():
        samples = figures["round_trips_ms"]
        assert len(samples) == 3 and min(samples) > 0
        assert figures["p50_ms"] == pytest.approx(np.median(samples), abs=1e-4)
        assert figures["max_ms"] == pytest.approx(max(samples), abs=1e-4)
    assert all(times["ours_p50_ms"] > 0 for times in bench["preprocessing"].values())
    assert bench["versions"]["websockets"] and "16 x 16" in bench["observation"]


def test_the_naive_way_gives_nearly_the_same_pixels() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    ours = pixel_values(frame, _SPEC)
    np.testing.assert_allclose(naive_pixel_values(frame, False), ours, atol=1e-5)
