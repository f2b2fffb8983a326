"""What the latency model multiplies is what torch multiplies, in every family."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_cases import FAMILY_CASES
from smolvla_cases import write_tiny_smolvla

from engines.targets import ORIN_JP7
from qvla_export.latency_model.flow_shape import FLOW_GEOMETRIES, shape_of, with_prefix
from qvla_export.latency_model.network_shape import NetworkShape
from qvla_export.latency_model.resnet_shape import RESNET_GEOMETRIES
from qvla_export.pipeline.predict import Device, predict_action
from qvla_export.pipeline.sizing.subject import subject_of_geometry
from qvla_export.policies.base import Policy
from qvla_export.policies.families import load_policy, recognize
from qvla_export.policies.layers import layer_shapes
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_products_are_those_of_torch(family: str, tmp_path: Path) -> None:
    case = FAMILY_CASES[family]
    checkpoint = case.write(tmp_path / "checkpoint")
    policy = load_policy(checkpoint)
    (seen,) = case.observations(1)
    shapes = layer_shapes(policy.layers())
    prompt = policy.processor.feeds(seen).get("input_ids")
    inputs = replace(
        recognize(checkpoint).inputs(checkpoint, None),
        prompt_tokens=0 if prompt is None else prompt.shape[1],
    )
    network = shape_of(shapes, inputs)
    assert multiplied_by(network, set(shapes)) == multiplied_by_torch(policy, seen)


def multiplied_by(network: NetworkShape, names: set[str]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for part in network.parts:
        for layer in part.layers:
            if layer.name in names:
                found[layer.name] += part.runs * layer.rows * layer.channels * layer.inputs
    return dict(found)


@torch.no_grad()
def multiplied_by_torch(policy: Policy, seen: Observation) -> dict[str, int]:
    """Multiplications of each quantizable layer in one executed action."""
    found: dict[str, int] = defaultdict(int)

    def counter(name: str) -> Callable[..., None]:
        def count(layer: torch.nn.Module, arguments: object, output: torch.Tensor) -> None:
            found[name] += output.numel() * layer.weight[0].numel()

        return count

    layers = policy.layers()
    handles = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    policy.infer(seen)
    for handle in handles:
        handle.remove()
    return dict(found)


def test_a_prefixs_length_tells_images_from_state(tmp_path: Path) -> None:
    checkpoint = write_tiny_smolvla(tmp_path / "c")
    stated = recognize(checkpoint).inputs(checkpoint, None)
    shapes = layer_shapes(load_policy(checkpoint).layers())
    bare = replace(stated, image_tokens=0, state_in_prefix=False)
    assert with_prefix(bare, shapes, 2 * 4 + 1) == stated
    assert not with_prefix(bare, shapes, 2 * 16).state_in_prefix
    with pytest.raises(QvlaError, match="export the bundle again"):
        with_prefix(bare, shapes, 7)


def test_smolvla_has_its_published_sizes() -> None:
    """450 million in all: a tower of 86, half of SmolVLM2's language model, an expert of 100."""
    network = FLOW_GEOMETRIES["smolvla-base"].network
    weights = {p.name: sum(x.channels * x.inputs for x in p.layers) for p in network.parts}
    assert weights["vision"] == pytest.approx(86e6 + 12288 * 960, rel=0.02)
    assert weights["flow"] + 16 * 320**2 == pytest.approx(98e6, rel=0.02)
    vision, prefix, flow = network.parts
    assert (vision.runs, prefix.runs, flow.runs) == (1, 1, 10)
    places = 3 * 64 + 12 + 1
    assert {layer.rows for layer in prefix.layers} == {places}
    assert sorted({attention.keys for attention in flow.attentions}) == [places, places + 50]
    assert len(flow.attentions) == 16


def test_act_has_its_published_sizes() -> None:
    """A ResNet-18 of 1.8 thousand million multiplications at 224 pixels: 6.1 times at 480 x 640."""
    network = RESNET_GEOMETRIES["act-aloha"].network
    vision, encoder, decoder = network.parts
    convolutions = vision.layers[:-1]
    assert sum(x.channels * x.inputs for x in convolutions) == pytest.approx(11.17e6, rel=0.001)
    multiplied = sum(x.rows * x.channels * x.inputs for x in convolutions)
    assert multiplied == pytest.approx(1.814e9 * 480 * 640 / 224**2, rel=0.01)
    assert {layer.rows for layer in encoder.layers[1:]} == {15 * 20 + 2}
    assert decoder.layers[-1].rows == 100


@pytest.mark.parametrize("name", ["smolvla-base", "act-aloha"])
def test_fewer_bits_are_predicted_to_be_faster(name: str) -> None:
    (mode, *_) = ORIN_JP7.power_modes
    found = {}
    for bits in ("16", "4"):
        subject = subject_of_geometry(name, bits, "none")
        report = predict_action(subject, Device(ORIN_JP7, mode.name, None))
        found[bits] = report.rows[1].ms
        assert set(report.rows[1].parts_ms) == {part.name for part in subject.network.parts}
    assert 0 < found["4"] < found["16"]
