"""tegrastats: the lines of real boards, and lines of none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import DATA

from jetson.board.state import UNKNOWN, BoardState
from jetson.board.tegrastats import Core, TegraStats, parse_tegrastats

LINES: dict[str, str] = json.loads((DATA / "board/tegrastats.json").read_text())
MEGA = 1 << 20


def parsed(name: str) -> TegraStats:
    return parse_tegrastats(LINES[name])


def test_orin_of_jetpack_7() -> None:
    line = parsed("orin-jp7")
    assert (line.ram_used_bytes, line.ram_total_bytes) == (20642 * MEGA, 62817 * MEGA)
    assert (line.largest_free_blocks, line.largest_free_block_bytes) == (1, 2 * MEGA)
    assert (line.swap_used_bytes, line.swap_total_bytes) == (None, None)
    assert line.cores[0] == Core(23.0, 2201.0) and len(line.cores) == 12
    assert (line.emc_percent, line.emc_mhz) == (3.0, 3199.0)
    assert (line.gpu_percent, line.gpu_mhz) == (12.0, (1300.0, 1300.0))
    assert line.temperatures_c == {"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625}
    assert line.rails_mw == {"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 3268, "VIN_SYS_5V0": 5500}


def test_orin_of_jetpack_6_pads_with_blanks() -> None:
    line = parsed("orin-jp6")
    assert (line.swap_used_bytes, line.swap_total_bytes) == (4915 * MEGA, 15348 * MEGA)
    assert (line.largest_free_blocks, line.largest_free_block_bytes) == (3, 4 * MEGA)
    assert (line.gpu_percent, line.gpu_mhz, line.emc_mhz) == (0.0, (305.0, 305.0), 2133.0)
    assert line.temperatures_c["tj"] == 53.062 and len(line.temperatures_c) == 6
    assert sum(line.rails_mw.values()) == 3205 + 4405 + 4767


def test_a_user_sees_no_memory_clock_and_cores_may_be_off() -> None:
    line = parsed("orin-user")
    assert (line.emc_percent, line.emc_mhz) == (None, None)
    assert (line.gpu_percent, line.gpu_mhz) == (0.0, ())
    assert line.cores[7] == Core(0.0, 729.0) and line.cores[8:] == (None,) * 4
    assert line.rails_mw["VDD_CPU_CV"] == 0, "a rail without load is known"


def test_jetpack_5_writes_capitals_and_zones_that_are_off() -> None:
    line = parsed("orin-jp5")
    assert (line.emc_percent, line.emc_mhz, line.gpu_percent) == (0.0, None, 75.0)
    assert {"cpu", "tboard", "tdiode", "tj"} <= set(line.temperatures_c)
    assert not {"gpu", "cv0", "cv1", "cv2"} & set(line.temperatures_c)
    assert line.rails_mw == {}


def test_thor_has_three_clusters_and_may_leave_the_load_out() -> None:
    idle, loaded, short = parsed("thor-idle"), parsed("thor-loaded"), parsed("thor-short")
    assert idle.cores == (Core(0.0, 2601.0), Core(5.0, 2601.0), None), "one clock for all cores"
    assert (idle.emc_percent, idle.emc_mhz) == (None, 4266.0)
    assert (idle.gpu_percent, idle.gpu_mhz) == (None, (1574.0,) * 3)
    assert (loaded.gpu_percent, loaded.emc_percent) == (87.0, 34.0)
    assert loaded.temperatures_c["gpu"] == 56.937, "the present value, not the highest"
    assert loaded.rails_mw["VIN"] == 124486, "the present value, not the mean"
    assert (short.gpu_percent, short.gpu_mhz) == (None, (1000.0,) * 3)
    assert short.largest_free_block_bytes == 512 << 10


def test_older_boards() -> None:
    nano, xavier = parsed("orin-nano-jp6"), parsed("xavier")
    assert (nano.gpu_percent, nano.gpu_mhz) == (10.0, (1300.0,))
    assert xavier.rails_mw == {
        "GPU": 0, "CPU": 311, "SOC": 932, "CV": 0, "VDDRQ": 621, "SYS5V": 1482,
    }  # fmt: skip
    assert xavier.cores[4:] == (None,) * 4


def test_unused_channels_are_no_rails_and_negative_ones_are() -> None:
    assert parsed("orin-jp5-root").rails_mw == {
        "VDD_GPU_SOC": 4788, "VDD_CPU_CV": 798, "VIN_SYS_5V0": 3842, "VDDQ_VDD2_1V8AO": 707,
    }  # fmt: skip
    assert parsed("thor-negative").rails_mw == {"VDD_GPU": -392, "VDD_CPU_SOC_MSS": 3924}


def test_a_power_controller_without_a_sensor_is_no_zone() -> None:
    for name in ("xavier-jp4", "tx2"):
        assert "PMIC@100C" in LINES[name]
        assert "pmic" not in parsed(name).temperatures_c
        assert max(parsed(name).temperatures_c.values()) < 40
    assert parsed("nano-jp4").temperatures_c["pmic"] == 50


@pytest.mark.parametrize("name", LINES)
def test_lines_become_states(name: str) -> None:
    line = parsed(name)
    state = line.to_state()
    assert BoardState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False))) == state
    assert state.memory_total_bytes == line.ram_total_bytes
    assert state.cores == sum(core is not None for core in line.cores)
    gpu = state.clock("gpu")
    assert (None if gpu is None else gpu.mhz) == max(line.gpu_mhz, default=None)
    assert state.memory_available_bytes is None, "used memory is not what is left"


def test_a_line_of_nothing_says_nothing() -> None:
    assert parse_tegrastats("").to_state() == UNKNOWN


@given(st.text(max_size=200))
def test_any_text_is_survived(text: str) -> None:
    parse_tegrastats(text).to_state().to_json()


@given(st.sampled_from(sorted(LINES)), st.data())
def test_damaged_lines_invent_nothing(name: str, data: st.DataObject) -> None:
    """A piece of a line says what the whole line says, or less."""
    words = LINES[name].split()
    start = data.draw(st.integers(0, len(words)))
    piece = parse_tegrastats(" ".join(words[start : data.draw(st.integers(start, len(words)))]))
    whole = parsed(name)
    assert piece.temperatures_c.items() <= whole.temperatures_c.items()
    assert piece.rails_mw.items() <= whole.rails_mw.items()
    assert piece.gpu_mhz in ((), whole.gpu_mhz) and piece.gpu_percent in (None, whole.gpu_percent)
    assert piece.cores in ((), whole.cores)


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    st.none() | st.integers(0, 100),
    st.integers(0, 200_000),
)
def test_every_form_of_a_clock_is_read(mhz: list[int], load: int | None, rail: int) -> None:
    percent = "" if load is None else f"{load}%"
    listed = ",".join(map(str, mhz))
    for text in (f"{percent}@[{listed}]", f"{percent}@[ {listed.replace(',', ', ')} ]"):
        line = parse_tegrastats(f"GR3D_FREQ {text} VIC off VDD_IN {rail}mW/1mW/2mW")
        assert line.gpu_mhz == tuple(map(float, mhz)) and line.gpu_percent == load
        assert line.rails_mw == {"VDD_IN": rail}
