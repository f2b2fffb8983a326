"""The latency model: published figures, what must make an action slower or faster, the limit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_latency_models import MODE, SMALL, model_of, small_sensitivities

from engines.bench.kernel_rates import ORIN_RATES, PublishedFigure, kernel_rates, published_figures
from engines.targets import CPU, ORIN_JP6, ORIN_JP7, RTX4070
from qvla_export.allocation.allocate import Budget, LatencyLimit, PruningRule, allocate_bits
from qvla_export.latency_model.kernel_rates import DeviceRates
from qvla_export.latency_model.network_shape import (
    LayerShape,
    NetworkShape,
    PartShape,
    network_of,
)
from qvla_export.latency_model.published_sizes import (
    GEOMETRIES,
    find_geometry,
)
from qvla_export.latency_model.roofline import LatencyModel, Widths
from qvla_export.shared.errors import ArtifactError, QvlaError


def uniform(network: NetworkShape, bits: int) -> dict[str, NDArray[np.int8]]:
    planned = {n: s for n, s in network.layers.items() if n in SMALL.layers or "model." in n}
    return {name: np.full(channels, bits, np.int8) for name, (channels, _) in planned.items()}


@st.composite
def any_widths(draw: st.DrawFn) -> dict[str, NDArray[np.int8]]:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = generator.dirichlet(np.ones(4))
    return {
        name: generator.choice(np.array([0, 4, 8, 16], np.int8), channels, p=shares)
        for name, (channels, _) in SMALL.layers.items()
    }


@pytest.mark.parametrize("figure", published_figures(), ids=lambda figure: figure.name)
def test_published_figures_are_within_the_stated_uncertainty(
    figure: PublishedFigure,
) -> None:
    uncertainty = figure.model.rates.uncertainty
    assert 1 / uncertainty <= figure.ratio <= uncertainty
    if figure.fitted:
        assert figure.ratio == pytest.approx(1, abs=0.01)


def test_figures_are_held_out_beside_the_fitted_ones() -> None:
    fitted = [figure.fitted for figure in published_figures()]
    # As many figures as fitted shares, bandwidth and compute.
    assert fitted.count(True) == 2
    assert fitted.count(False) >= 2


def test_openvla_has_its_published_sizes() -> None:
    network = GEOMETRIES["openvla-7b"].network
    weights = {
        stage.name: sum(layer.channels * layer.inputs for layer in stage.layers)
        for stage in network.parts
    }
    assert weights["prefill"] == weights["decode"] == 6_476_005_376  # Llama-2-7B's linear layers
    assert weights["head"] == 32064 * 4096
    # 7.54 billion parameters, of which the embedding and each tower's last block only look up or
    # never reach the action.
    last_blocks = 12 * 1024**2 + 4 * 1152**2 + 2 * 1152 * 4304
    every = weights["vision"] + weights["prefill"] + 2 * weights["head"] + last_blocks
    assert every == pytest.approx(7.54e9, rel=0.005)
    assert [stage.runs for stage in network.parts] == [1, 1, 6, 7]
    decoder = GEOMETRIES["openvla-oft-7b"].network.parts[1]
    assert max(layer.rows for layer in decoder.layers) == 2 * 256 + 30 + 1 + 56 + 1


def test_decode_is_bound_by_bytes_and_one_pass_by_multiplications() -> None:
    steps = GEOMETRIES["openvla-7b"].network
    decode = {bits: stage_ms(steps, "decode", bits) for bits in (16, 8, 4)}
    assert 1.8 < decode[16] / decode[8] < 2.1
    assert 3.2 < decode[16] / decode[4] < 4
    once = GEOMETRIES["openvla-oft-7b"].network
    assert stage_ms(once, "decoder", 16) == pytest.approx(stage_ms(once, "decoder", 4), rel=0.01)
    integer = model_of(once).predict(uniform(once, 8), "int8").parts[1].total_ms
    assert 0.5 < integer / stage_ms(once, "decoder", 8) < 0.75
    # 4-bit codes have no integer products; rounding activations only costs.
    narrow = model_of(once).predict(uniform(once, 4), "int8").parts[1].total_ms
    assert narrow > stage_ms(once, "decoder", 4)


def test_expanded_codes_take_the_time_and_memory_of_eight_bits() -> None:
    once = GEOMETRIES["openvla-oft-7b"].network
    expanded = replace(model_of(once), form="expanded")
    eight = model_of(once).predict(uniform(once, 8), "int8").total_ms
    for bits in (8, 4, 2):
        widths = uniform(once, bits)
        assert expanded.predict(widths, "int8").total_ms == pytest.approx(eight, rel=1e-3)
        # 32-bit scales of channels instead of the target's 16-bit ones.
        assert expanded.weight_bytes(widths, "int8") == pytest.approx(
            model_of(once).weight_bytes(uniform(once, 8), "int8"), rel=1e-3
        )
    # Without rounded inputs nothing expands.
    plain = uniform(once, 4)
    assert expanded.predict(plain) == model_of(once).predict(plain)


def test_a_kernel_reads_packed_codes_and_multiplies_integers() -> None:
    steps = GEOMETRIES["openvla-7b"].network
    kernel = replace(model_of(steps), form="kernel")
    nbytes = {bits: kernel.weight_bytes(uniform(steps, bits), "int8") for bits in (8, 4, 2)}
    assert 1.9 < nbytes[8] / nbytes[4] < 2 and 1.8 < nbytes[4] / nbytes[2] < 2
    decode = {}
    for bits in (8, 4, 2):
        found = kernel.predict(uniform(steps, bits), "int8").parts
        decode[bits] = next(part.total_ms for part in found if part.name == "decode")
    assert decode[2] < 0.7 * decode[4] < 0.5 * decode[8]
    once = GEOMETRIES["openvla-oft-7b"].network
    passes = replace(model_of(once), form="kernel")
    expanded = replace(passes, form="expanded")
    widths = uniform(once, 4)
    assert passes.predict(widths, "int8").total_ms == pytest.approx(
        expanded.predict(widths, "int8").total_ms, rel=0.02
    )


@given(any_widths(), st.sampled_from(["none", "int8"]))
def test_no_form_of_one_launch_is_slower_than_buckets(widths: Widths, activations: str) -> None:
    rates = replace(ORIN_RATES, channel_tile=1)
    found = {
        form: replace(model_of(SMALL.network, rates), form=form).predict(widths, activations)  # type: ignore[arg-type]  # Literals
        for form in ("dequantized", "expanded", "kernel")
    }
    assert found["kernel"].total_ms <= found["dequantized"].total_ms * (1 + 1e-9)
    assert found["kernel"].total_ms <= found["expanded"].total_ms * (1 + 1e-9)


def stage_ms(network: NetworkShape, name: str, bits: int) -> float:
    found = model_of(network).predict(uniform(network, bits))
    return next(stage.total_ms for stage in found.parts if stage.name == name)


@given(any_widths(), st.sampled_from(["none", "int8"]))
def test_no_device_that_is_better_is_slower(widths: Widths, activations: str) -> None:
    def total(model: LatencyModel) -> float:
        return model.predict(widths, activations).total_ms  # type: ignore[arg-type]  # a Literal

    model = model_of(SMALL.network)
    assert total(model) > 0
    for field, better in (
        ("bandwidth_share", ORIN_RATES.bandwidth_share * 1.5),
        ("compute_share", ORIN_RATES.compute_share * 1.1),
        ("launch_us", ORIN_RATES.launch_us / 2),
        ("channel_tile", 1),
    ):
        assert total(replace(model, rates=replace(ORIN_RATES, **{field: better}))) <= total(model)
    modes = [total(replace(model, mode=mode)) for mode in ORIN_JP7.power_modes]
    assert modes == sorted(modes)


@given(any_widths(), st.data())
def test_pruning_whole_layers_of_channels_never_slows(widths: Widths, data: st.DataObject) -> None:
    """A whole bucket leaves; a few channels more in another could start a further tile."""
    layer = data.draw(st.sampled_from(sorted(widths)))
    pruned = {**widths, layer: np.where(widths[layer] == 4, 0, widths[layer]).astype(np.int8)}
    model = model_of(SMALL.network, replace(ORIN_RATES, channel_tile=1, launch_us=0.0))
    before, after = (sum(s.weights_ms for s in model.predict(w).parts) for w in (widths, pruned))
    assert after <= before * (1 + 1e-12)


def test_pruned_units_leave_their_consumer_too() -> None:
    widths = uniform(SMALL.network, 8)
    block = "language_model.model.layers.0.mlp."
    half = np.repeat(np.array([0, 8], np.int8), 128)
    both = {**widths, f"{block}gate_proj": half, f"{block}up_proj": half}
    rates = replace(ORIN_RATES, launch_us=0.0, channel_tile=1)
    single = NetworkShape(
        tuple(
            PartShape(s.name, tuple(x for x in s.layers if x.name == f"{block}down_proj"))
            for s in SMALL.network.parts
        )
    )
    model = model_of(SMALL.network, rates)
    saved = model.predict(widths).parts[1].weights_ms - model.predict(both).parts[1].weights_ms
    down = model_of(single, rates).predict({f"{block}down_proj": widths[f"{block}down_proj"]})
    gate = model.channel_ms(f"{block}gate_proj", (8,))[0]
    # 128 channels of two producers and half of the consumer's columns; outputs stay.
    assert saved > 2 * 128 * gate + 0.2 * down.parts[1].weights_ms


def test_launches_and_tiles_are_counted() -> None:
    layer = LayerShape("a.q_proj", 100, 64, 10)
    siblings = (layer, replace(layer, name="a.k_proj"), replace(layer, name="a.v_proj"))
    network = NetworkShape((PartShape("one", siblings),))
    launches = replace(ORIN_RATES, launch_us=1e6)
    mixed = np.repeat(np.array([4, 8, 16, 0], np.int8), 25)
    widths = {x.name: mixed for x in siblings}
    # A product for each width, one kernel between products, one to restore the order.
    assert model_of(network, launches).predict(widths).total_ms == pytest.approx(5000, rel=0.01)
    assert model_of(network, launches).predict().total_ms == pytest.approx(2000, rel=0.01)
    assert model_of(network, launches).predict(widths, "int8").total_ms > 5900
    compute = replace(ORIN_RATES, launch_us=0.0, bandwidth_share=1e9)
    one = {x.name: np.repeat(np.array([4, 0], np.int8), [1, 99]) for x in siblings[:1]}
    single = NetworkShape((PartShape("one", siblings[:1]),))
    full = {"a.q_proj": np.repeat(np.array([4, 0], np.int8), [64, 36])}
    tiled = [model_of(single, compute).predict(w).parts[0].weights_ms for w in (one, full)]
    assert tiled[0] == pytest.approx(tiled[1])


def test_unchecked_conditions_have_the_wider_interval() -> None:
    model = model_of(SMALL.network)
    assert model.predict().uncertainty == ORIN_RATES.uncertainty
    assert model.predict({}, "int8").uncertainty == ORIN_RATES.unchecked_uncertainty
    slow = replace(model, mode=ORIN_JP7.power_mode("15W"))
    assert slow.predict().uncertainty == ORIN_RATES.unchecked_uncertainty


def test_every_gpu_target_with_power_modes_has_rates() -> None:
    for target in (ORIN_JP6, ORIN_JP7, RTX4070):
        rates = kernel_rates(target)
        assert rates.checked_mode in [mode.name for mode in target.power_modes]
    with pytest.raises(QvlaError, match="qvla bench rates"):
        kernel_rates(CPU)


def test_bad_input_is_refused() -> None:
    model = model_of(SMALL.network)
    with pytest.raises(QvlaError, match="no such layer"):
        model.predict({"other": np.zeros(4, np.int8)})
    name = next(iter(SMALL.layers))
    with pytest.raises(QvlaError, match=r"3 widths .*64"):
        model.predict({name: np.zeros(3, np.int8)})
    with pytest.raises(QvlaError, match="must be positive"):
        replace(ORIN_RATES, compute_share=0.0)
    with pytest.raises(QvlaError, match="OpenVLA's family"):
        network_of({"encoder.0": (4, 4)}, SMALL.inputs)
    with pytest.raises(QvlaError, match="tile the image"):
        network_of(SMALL.layers, replace(SMALL.inputs, image_size=60))
    with pytest.raises(QvlaError, match="no rate for float32"):
        mode = replace(MODE, dense_tops={"float16": 1.0})
        LatencyModel(SMALL.network, CPU, mode, ORIN_RATES).predict()
    with pytest.raises(QvlaError, match="Did you mean 'openvla-7b'"):
        find_geometry("openvla7b")


@pytest.mark.parametrize("method", ["algorithm1", "hull"])
def test_a_plan_keeps_the_latency_limit_and_the_budget(method: str) -> None:
    table, budget = small_sensitivities(), Budget("bits per channel", 6.0)
    model = model_of(SMALL.network)
    free = allocate_bits(table, budget, ORIN_JP7, method=method)  # type: ignore[arg-type]  # Literal
    least = model.predict({n: np.zeros_like(w) for n, w in free.widths.items()}).total_ms
    most = model.predict(free.widths).total_ms
    previous = free
    for share in (1.0, 0.6, 0.3, 0.1):
        limit = LatencyLimit(least + share * (most - least) + 1e-6, model)
        planned = allocate_bits(table, budget, ORIN_JP7, latency=limit, method=method)  # type: ignore[arg-type]  # Literal
        assert model.predict(planned.widths).total_ms <= limit.max_ms
        assert planned.mean_bits_per_channel <= 6.0
        assert all((planned.widths[n] <= free.widths[n]).all() for n in free.widths)
        assert planned.expected_error is not None and previous.expected_error is not None
        assert planned.expected_error >= previous.expected_error
        assert "predicted on orin-jp7" in planned.budget
        previous = planned
    assert (
        allocate_bits(
            table,
            budget,
            ORIN_JP7,
            latency=LatencyLimit(most + 1, model),
            method=method,  # type: ignore[arg-type]  # Literal
        ).widths.keys()
        == free.widths.keys()
    )


def test_an_unreachable_latency_is_refused_with_the_least() -> None:
    table, budget = small_sensitivities(), Budget("bits per channel", 8.0)
    model = model_of(SMALL.network)
    nothing = {n: np.zeros(c, np.int8) for n, (c, _) in SMALL.layers.items()}
    least = model.predict(nothing).total_ms
    with pytest.raises(QvlaError, match=rf"at most 0.001 ms .*reach is {least:.2f} ms"):
        allocate_bits(table, budget, ORIN_JP7, latency=LatencyLimit(0.001, model))
    with pytest.raises(QvlaError, match="above 0 ms"):
        LatencyLimit(0.0, model)
    with pytest.raises(QvlaError, match="no such layer"):
        other = model_of(NetworkShape(SMALL.network.parts[:1]))
        allocate_bits(table, budget, ORIN_JP7, latency=LatencyLimit(1.0, other))


def test_caps_on_pruning_hold_under_a_latency_limit() -> None:
    table, budget = small_sensitivities(), Budget("bits per channel", 8.0)
    model = model_of(SMALL.network)
    rule = PruningRule(max_share_of_layer=0.25, max_share=0.1)
    most = model.predict(allocate_bits(table, budget, ORIN_JP7, pruning=rule).widths).total_ms
    limit = LatencyLimit(0.99 * most, model)
    planned = allocate_bits(table, budget, ORIN_JP7, pruning=rule, latency=limit)
    assert model.predict(planned.widths).total_ms <= limit.max_ms
    assert planned.histogram()[0] <= 0.1 * sum(planned.histogram().values())
    assert all((w == 0).mean() <= 0.25 for w in planned.widths.values())


def test_device_rates_round_trip_and_refuse_damage(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    rates = replace(ORIN_RATES, expanded_share={4: 0.5}, expanded_gcodes_s={8: 1.5})
    DeviceRates(MODE, rates).save(path)
    assert DeviceRates.load(path) == DeviceRates(MODE, rates)
    value = json.loads(path.read_text())
    for change in ({"format": "other"}, {"mode": {}}, {"rates": {"launch_us": 1}}, {"rates": 3}):
        path.write_text(json.dumps(value | change))
        with pytest.raises(ArtifactError, match="device rates"):
            DeviceRates.load(path)
