"""The table of targets: what each has, and what it refuses with a reason."""

import pytest

from engines.targets import TARGETS, UnknownTarget, find_target
from qvla_export.allocation.setting import parse_setting
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import UnsupportedOnTarget

TENSORRT = ("rtx4070", "orin-jp7", "orin-jp6")


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_is_whole(name: str) -> None:
    target = find_target(name)
    assert target.name == name
    assert set(target.containers) == {0, 2, 4, 8, 16}
    for bits, container in target.containers.items():
        assert container.bits >= bits
        # One row of 4096 weights costs what it says and no less than its bits.
        assert container.row_bits(4096) >= 4096 * bits
    assert ("ort" in target.runtime) or (target.compute == "float16" and target.power_modes)
    for mode in target.power_modes:
        rates = mode.dense_tops
        assert mode.bandwidth_gb_s > 0 and rates["int8"] > rates["float16"] > rates["float32"] > 0


@pytest.mark.parametrize(
    ("target", "setting", "reason"),
    [
        ("orin-jp7", "w8afp8", "sm_87 has no fp8"),
        ("orin-jp6", "wfp4", "sm_87 has no fp8 or fp4"),
        ("rtx4070", "w4-asym", "quantizes symmetrically"),
        ("orin-jp7", "wint2", "no 2-bit type"),
        ("cuda", "w8-asym", "target cpu has them"),
        ("cuda", "wfp8", "packs no fp8"),
    ],
)
def test_formats_a_target_lacks_are_refused_with_the_reason(
    target: str, setting: str, reason: str
) -> None:
    with pytest.raises(UnsupportedOnTarget, match=reason):
        parse_setting(setting, find_target(target))
    with pytest.raises(QvlaError, match="a setting is"):
        parse_setting(setting)


@pytest.mark.parametrize("name", TENSORRT)
def test_two_bits_cost_four_on_tensorrt_and_whole_groups(name: str) -> None:
    target = find_target(name)
    assert target.containers[2] == target.containers[4]
    assert target.containers[4].row_bits(588) == 640 * 4 + 5 * 16
    assert find_target("cpu").containers[4].row_bits(588) == 588 * 4 + 10 * 16


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownTarget, match="Did you mean 'orin-jp7'"):
        find_target("orin-jp8")
    with pytest.raises(UnsupportedOnTarget, match="MAXN"):
        find_target("orin-jp7").power_mode("10W")
    assert find_target("orin-jp7").power_mode().name == "MAXN"
    assert find_target("rtx4070").power_mode("200W").bandwidth_gb_s == 504
