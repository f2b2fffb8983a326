"""A random OpenVLA checkpoint of a geometry: the family's own reader takes it, sharded; engines."""

from pathlib import Path

import numpy as np
import pytest

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import Geometry, TransformerSize
from qvla_export.pipeline.bench.size import RealSize, measure_real_size
from qvla_export.policies.families import family_with_size, load_policy, recognize
from qvla_export.policies.openvla.random_checkpoint import write_random_checkpoint
from qvla_export.shared.observation import Observation

SMALL = Geometry(
    dino=TransformerSize(64, 128, 2),
    siglip=TransformerSize(64, 192, 2),
    llama=TransformerSize(128, 320, 3),
    patch_size=14,
    inputs=PolicyInputs(1, 28, 30, 1, 7, head="tokens", autoregressive=True),
)


def test_it_is_recognized_and_acts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_random_checkpoint(folder, SMALL, shard_bytes=1 << 22)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert recognize(folder).name == "openvla"
    policy = load_policy(folder)
    shapes = {
        name: (layer.weight.shape[0], layer.weight[0].numel())
        for name, layer in policy.layers().items()
    }
    assert shapes == SMALL.layers
    seen = Observation({"full_image": np.zeros((28, 28, 3), np.uint8)}, "pick up the black bowl")
    actions = policy.infer(seen).actions
    assert actions.shape == (1, 7) and np.isfinite(actions).all()


def test_the_published_size_is_its_familys() -> None:
    assert family_with_size("openvla-7b").name == "openvla"
    assert family_with_size("openvla-oft-7b").name == "oft"


@pytest.mark.slow
def test_what_decodes_token_by_token_becomes_engines_too(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "checkpoint", SMALL)
    figures = measure_real_size(RealSize(tmp_path, "openvla-7b"))
    steps = {step.name: step.result for step in figures.steps}
    assert steps["engines"]["engines"] == steps["export"]["stages"] == 7
    assert steps["one action"]["largest_drift_from_torch"] < 1e-3
