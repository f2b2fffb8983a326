"""Names of settings."""

import pytest

from qvla_export.allocation.setting import parse_setting
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
