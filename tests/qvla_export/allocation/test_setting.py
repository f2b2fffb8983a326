"""Names of settings."""

import pytest

from engines.targets import find_target
from qvla_export.allocation.setting import parse_setting, usual_scales
from qvla_export.shared.errors import QvlaError


@pytest.mark.parametrize(
    ("name", "kind", "bits", "activations"),
    [
        ("w8a8", "planned", 8, 8),
        ("w4a8", "planned", 4, 8),
        ("w2.5a8", "planned", 2.5, 8),
        ("w4a4-rtn", "uniform", 4, 4),
        ("w8a8-rtn", "uniform", 8, 8),
        ("w4", "planned", 4, None),
    ],
)
def test_setting_names(name: str, kind: str, bits: float, activations: int | None) -> None:
    setting = parse_setting(name)
    assert (setting.kind, setting.bits, setting.activation_bits) == (kind, bits, activations)


@pytest.mark.parametrize("name", ["w8a16", "w8a", "a8", "w8a8-", "w0a8", "floata8", "w3a8-rtn"])
def test_names_of_no_setting_are_refused(name: str) -> None:
    with pytest.raises(QvlaError):
        parse_setting(name)


@pytest.mark.parametrize(
    ("names", "target", "form"),
    [
        ("float w4 w2a8", "cpu", "two-level"),
        # Eight mean bits are those of channels of more and of fewer.
        ("w8a8 w4", "cpu", "two-level"),
        # Uniform baselines have scales of their own.
        ("float w4 w8 w4a8-rtn", "cpu", "group"),
        ("w4a4", "cpu", "group"),
        # TensorRT would store 8 bits, and ONNX Runtime's CUDA kernels never ran with them.
        ("w4a8", "orin-jp7", "group"),
        ("w4a8", "cuda", "group"),
    ],
)
def test_codes_expand_where_that_costs_nothing(names: str, target: str, form: str) -> None:
    settings = [parse_setting(name) for name in names.split()]
    assert usual_scales(settings, find_target(target)) == form
    assert usual_scales(settings, find_target("cpu", zero_points=True)) == "group"
