"""Board state: what files and tools say of a machine, on Jetsons old and new and elsewhere."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_board import orin, orin_files, write
from hypothesis import given
from hypothesis import strategies as st
from places import DATA

from engines.trt.gpu import read_power_modes
from jetson.board import BoardState, ClockState, ask_board, read_board_state
from jetson.board.board_tools import first_lines
from jetson.board.jtop import read_jtop
from jetson.board.nvpmodel import fastest_mode, mode_of_answer
from jetson.board.state import UNKNOWN
from qvla_export.shared.errors import ArtifactError

LINES: dict[str, str] = json.loads((DATA / "board/tegrastats.json").read_text())


def nothing() -> BoardState:
    return UNKNOWN


def test_a_jetson_is_recognized(tmp_path: Path) -> None:
    state = read_board_state(orin(tmp_path))
    assert (state.model, state.module) == ("NVIDIA Jetson AGX Orin Developer Kit", "p3701-0005")
    assert (state.l4t, state.jetpack, state.tensorrt) == ("36.4.3", "6.2", "10.3.0.30")
    assert (state.kernel, state.cpu_model) == ("5.15.148-tegra", "ARMv8 Processor rev 1 (v8l)")
    assert (state.cores, state.governors, state.load_1m) == (2, ("schedutil",), 0.52)
    assert (state.power_mode, state.clocks_locked) == ("MAXN", True)
    assert state.clocks == (
        ClockState("cpu0", 2201.6, 2201.6, 2201.6, True),
        ClockState("cpu1", 2201.6, 2201.6, 2201.6, True),
        ClockState("gpu", 1300.5, 1300.5, 1300.5, True),
        ClockState("emc", 3199.0, 204.0, 3199.0, True),
    )
    assert state.temperatures_c == {"cpu": 52.968, "gpu": 47.625}, "zones that are off are left out"
    assert state.rails_mw == {"VDD_GPU_SOC": 5130.0}, "19 V of 270 mA; no sum, no unused channel"
    assert (state.throttling, state.throttle_counts) == ((), {"oc1": 0, "oc3": 7})
    assert state.memory_available_bytes == 60000000 * 1024
    assert state.swap_used_bytes == (32161708 - 32000000) * 1024
    assert state.zram_bytes == 2 * 2680140 * 1024
    assert (state.largest_free_block_bytes, state.largest_free_blocks) == (4 << 20, 7)
    assert state.is_jetson


@pytest.mark.parametrize("name", ["cpu", "gpu", "emc"])
def test_one_clock_that_may_change_is_enough(tmp_path: Path, name: str) -> None:
    files, loose = orin_files(), orin_files(locked=False)
    parts = {"cpu": "/cpu1/", "gpu": "17000000.gpu", "emc": "/emc/"}
    changed = {key: text for key, text in loose.items() if parts[name] in key}
    assert read_board_state(write(tmp_path, files)).clocks_locked is True
    state = read_board_state(write(tmp_path, changed))
    assert state.clocks_locked is False
    assert [c.name for c in state.clocks if not c.locked] == ["cpu1" if name == "cpu" else name]


def test_throttling_is_what_the_kernel_does_now(tmp_path: Path) -> None:
    hot = "sys/class/thermal/cooling_device1/cur_state"
    state = read_board_state(write(orin(tmp_path), {hot: "1\n"}))
    assert state.throttling == ("gpu-throttle-alert",)


def test_thor_has_other_files(tmp_path: Path) -> None:
    gpu, memory = "sys/class/devfreq/gpu-gpc-0", "sys/class/devfreq/bwmgr"
    root = write(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.2, GCID: 1, BOARD: generic",
            "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0",
            f"{gpu}/cur_freq": "1574000000",
            f"{gpu}/min_freq": "315000000",
            f"{gpu}/max_freq": "1574000000",
            f"{memory}/cur_freq": "4266000000",
            f"{memory}/min_freq": "4266000000",
            f"{memory}/max_freq": "4266000000",
        },
    )
    state = read_board_state(root)
    assert (state.l4t, state.jetpack, state.module) == ("38.2.2", "7.0", "p3834-0008")
    assert state.clock("gpu") == ClockState("gpu", 1574.0, 315.0, 1574.0, False)
    assert state.clock("emc") == ClockState("emc", 4266.0, 4266.0, 4266.0, True)
    assert state.clocks_locked is False


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("R35 (release), REVISION: 3.1", "5.1.1"),
        ("R36 (release), REVISION: 4.7", "6.2.1"),
        ("R39 (release), REVISION: 2.0", "7.2"),
        ("R39 (release), REVISION: 2.2", "7.2.2"),
        ("R36 (release), REVISION: 2.0", "6.0 DP"),
        ("R34 (release), REVISION: 1.1", "5.0.1 DP"),
        ("R77 (release), REVISION: 1.0", ""),
    ],
)
def test_jetpack_follows_from_the_release(tmp_path: Path, release: str, jetpack: str) -> None:
    state = read_board_state(write(tmp_path, {"etc/nv_tegra_release": f"# {release}, GCID: 1"}))
    assert state.jetpack == jetpack


def test_a_container_knows_the_release_by_its_package(tmp_path: Path) -> None:
    files = orin_files()
    state = read_board_state(write(tmp_path, {k: files[k] for k in ("var/lib/dpkg/status",)}))
    assert (state.l4t, state.jetpack, state.tensorrt) == ("36.4.3", "6.2", "10.3.0.30")


def test_a_preview_is_told_from_the_release_after_it(tmp_path: Path) -> None:
    package = "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.0-b52\n"
    for revision, jetpack in (("2.0", "6.0 DP"), ("3.0", "6.0")):
        release = f"# R36 (release), REVISION: {revision}, GCID: 1"
        files = {"etc/nv_tegra_release": release, "var/lib/dpkg/status": package}
        assert read_board_state(write(tmp_path, files)).jetpack == jetpack


@pytest.mark.parametrize(
    ("status", "installed"),
    [
        ("deinstall ok config-files", False),
        ("install ok half-installed", False),
        ("install ok unpacked", False),
        ("install ok installed", True),
        ("hold ok installed", True),
        ("deinstall ok installed", True),
    ],
)
def test_a_removed_package_is_not_installed(tmp_path: Path, status: str, installed: bool) -> None:
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1",
        "var/lib/dpkg/status": f"Package: nvidia-jetpack\nStatus: {status}\nVersion: 6.9+b106\n\n"
        f"Package: tensorrt\nStatus: {status}\nPriority: standard\nVersion: 8.6.2.3-1\n",
    }
    state = read_board_state(write(tmp_path, files))
    assert state.jetpack == ("6.9" if installed else "6.2"), "else the release's"
    assert state.tensorrt == ("8.6.2.3" if installed else "")


@pytest.mark.parametrize(
    "text", ["", "nan", "\xff" * 40, "processor : \nR99", "1 2 3", "-1", "inf"]
)
def test_reading_a_board_never_fails(tmp_path: Path, text: str) -> None:
    state = read_board_state(write(tmp_path, dict.fromkeys(orin_files(), text)))
    assert BoardState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False))) == state
    assert read_board_state(tmp_path / "nowhere").cores == 0


def test_sensors_that_refuse_to_be_read_are_unknown(tmp_path: Path) -> None:
    root = orin(tmp_path)
    zone = root / "sys/class/thermal/thermal_zone0/temp"
    zone.unlink()
    zone.mkdir()
    assert read_board_state(root).temperatures_c == {"gpu": 47.625}


def test_this_machine_has_cores_and_memory() -> None:
    state = read_board_state()
    assert state.cores >= 1 and (state.memory_available_bytes or 0) > 0


def test_states_round_trip_and_old_ones_are_read(tmp_path: Path) -> None:
    state = read_board_state(orin(tmp_path))
    written = json.loads(json.dumps(state.to_json(), allow_nan=False))
    assert BoardState.from_json(written) == state
    old = BoardState.from_json({name: written[name] for name in list(written)[:10]})
    assert (old.l4t, old.clocks, old.power_mode) == ("36.4.3", (), None)


@pytest.mark.parametrize(
    "change",
    [
        {"clocks": [{"speed": 1}]}, {"clocks": 7}, {"rails_mw": 7}, {"governors": None},
        {"temperatures_c": {"cpu": "hot"}}, {"temperatures_c": {"cpu": float("nan")}},
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    written = read_board_state(orin(tmp_path)).to_json()
    with pytest.raises(ArtifactError):
        BoardState.from_json({**written, **change})


def test_what_is_known_is_kept_and_the_rest_is_filled(tmp_path: Path) -> None:
    state = read_board_state(orin(tmp_path))
    other = read_board_state()
    assert state.filled_from(UNKNOWN) == state
    assert UNKNOWN.filled_from(state) == state
    assert state.filled_from(other).l4t == "36.4.3"
    partly = UNKNOWN.filled_from(BoardState.from_json({**UNKNOWN.to_json(), "swap_used_bytes": 0}))
    assert partly.filled_from(state).swap_used_bytes == 0, "0 is known"


def test_a_board_is_asked_for_what_its_files_do_not_say(tmp_path: Path) -> None:
    # A user who is not root: no clocks of the memory, no rails; and nvpmodel's files are hidden.
    hidden = ("bpmp", "hwmon", "nvpmodel")
    files = {k: v for k, v in orin_files().items() if not any(part in k for part in hidden)}
    root, asked = write(tmp_path, files), []

    def ask(command: Any) -> str:
        asked.append(command[0])
        return "NV Power Mode: MODE_30W\n2\n" if command[0] == "nvpmodel" else LINES["orin-jp7"]

    state = ask_board(root, ask, nothing)
    assert asked == ["nvpmodel", "tegrastats"]
    assert state.power_mode == "30W"
    assert state.clock("emc") == ClockState("emc", 3199.0)
    assert state.clock("gpu") == ClockState("gpu", 1300.5, 1300.5, 1300.5, True), "as the files say"
    assert state.rails_mw["VDD_GPU_SOC"] == 5139.0
    assert state.temperatures_c["cpu"] == 52.968 and state.temperatures_c["soc2"] == 48.406


def test_a_plain_machine_is_asked_nothing(tmp_path: Path) -> None:
    def ask(command: Any) -> str:
        raise AssertionError(f"{command} on a machine that is no Jetson")

    root = write(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name : some CPU\n"})
    assert ask_board(root, ask, nothing) == read_board_state(root)


def jtop_service(**changes: Any) -> Any:
    shown: dict[str, Any] = {
        "board": {
            "hardware": {
                "Model": "AGX Orin",
                "L4T": "36.4.3",
                "Jetpack": "6.2",
                "Serial Number": "1",
            },
            "libraries": {"TensorRT": "10.3.0.30"},
        },
        "gpu": {"gpu": {"freq": {"cur": 1300500, "min": 306000, "max": 1300500}}},
        "memory": {"EMC": {"cur": 3199000, "min": 204000, "max": 3199000}},
        "temperature": {
            "cpu": {"temp": 50.5, "online": True},
            "cv0": {"temp": -256, "online": False},
            "PMIC-Die": {"temp": 100.0, "online": True},
        },
        "power": {"rail": {"VDD_GPU_SOC": {"power": 4000}, "NC": {"power": 0}}, "tot": {}},
        "nvpmodel": SimpleNamespace(name="MAXN"),
        "jetson_clocks": False,
    }
    return SimpleNamespace(**{**shown, **changes})


def test_jetson_stats_is_asked_where_it_is_installed() -> None:
    @contextmanager
    def connected() -> Any:
        yield jtop_service()

    state = read_jtop(connected)
    assert (state.power_mode, state.clocks_locked, state.tensorrt) == ("MAXN", False, "10.3.0.30")
    assert state.clock("emc") == ClockState("emc", 3199.0, 204.0, 3199.0, True)
    assert state.clock("gpu") == ClockState("gpu", 1300.5, 306.0, 1300.5, False)
    assert state.temperatures_c == {"cpu": 50.5}, "neither what is off nor what has no sensor"
    assert state.rails_mw == {"VDD_GPU_SOC": 4000.0}
    assert "1" not in state.to_json().values(), "nothing identifies the machine"


def test_a_service_that_does_not_answer_costs_nothing() -> None:
    @contextmanager
    def refused() -> Any:
        raise RuntimeError("The jtop.service is not active")
        yield

    @contextmanager
    def another_version() -> Any:
        yield SimpleNamespace(board=7)

    assert read_jtop(refused) == read_jtop(another_version) == read_jtop(lambda: None) == UNKNOWN


def test_a_tool_is_ended_after_its_first_lines() -> None:
    assert first_lines(["yes", "RAM 1/2MB"], 2) == "RAM 1/2MB\nRAM 1/2MB\n"
    assert first_lines(["yes"]).count("y\n") == 50
    assert first_lines(["true"]) == first_lines(["no-such-tool-of-qvla"]) == ""


def test_power_modes(tmp_path: Path) -> None:
    assert mode_of_answer("NV Fan Mode:quiet\nNV Power Mode: MODE_30W\n2\n") == "30W"
    assert mode_of_answer("NV Power Mode: MAXN_SUPER\n2\n") == "MAXN_SUPER"
    assert mode_of_answer("NVPM ERROR: no") is None
    assert fastest_mode(orin(tmp_path)) == (0, "MAXN")
    nano = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    assert fastest_mode(write(tmp_path, {"etc/nvpmodel.conf": nano})) == (2, "MAXN_SUPER")
    assert fastest_mode(tmp_path / "nowhere") is None


def test_nvpmodel_may_complain_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints = "NVPM ERROR: Error opening /sys/x: 2\\nNVPM ERROR: failed to read PARAM GPU\\n" * 3
    tool = tmp_path / "bin/nvpmodel"
    write(
        tmp_path,
        {"bin/nvpmodel": f"#!/bin/sh\nprintf '{complaints}NV Power Mode: MODE_30W\\n2\\n'\n"},
    )
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    files = {n: text for n, text in orin_files().items() if "nvpmodel" not in n}
    state = ask_board(write(tmp_path / "root", files), jtop=nothing)
    assert state.power_mode == "30W"


@pytest.mark.parametrize(
    ("configuration", "modes"),
    [
        (
            "# < POWER_MODEL ID=0 NAME=MAXN >\n#< POWER_MODEL ID=9 NAME=MAXN_SUPER >\n"
            "< POWER_MODEL ID=0 NAME=MODE_50W >\n",
            {0: "MODE_50W"},
        ),
        ("< POWER_MODEL NAME=MAXN ID=3 >\n", {3: "MAXN"}),
        (
            "< POWER_MODEL ID=0 NAME=MAXN >\r\n  <POWER_MODEL ID=1 NAME=10W>\r\n",
            {0: "MAXN", 1: "10W"},
        ),
        ("< POWER_MODEL ID=4 NAME=GPU_FREQ_100 >\nGPU MAX_FREQ 1\n", {4: "GPU_FREQ_100"}),
        ("< POWER_MODEL ID=0 >\n< PM_CONFIG DEFAULT=2 >\n", {}),
    ],
)
def test_modes_that_are_commented_out_are_none(
    tmp_path: Path, configuration: str, modes: dict[int, str]
) -> None:
    assert read_power_modes(write(tmp_path, {"etc/nvpmodel.conf": configuration})) == modes


@pytest.fixture(scope="module")
def orin_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return orin(tmp_path_factory.mktemp("orin"))


@given(st.text(max_size=200))
def test_what_the_tools_print_changes_nothing_the_files_say(orin_root: Path, text: str) -> None:
    known = read_board_state(orin_root)
    asked = ask_board(orin_root, lambda _: text, nothing)
    assert (asked.power_mode, asked.clocks_locked) == ("MAXN", True)
    assert known.rails_mw.items() <= asked.rails_mw.items()
    assert {*known.clocks} <= {*asked.clocks}


@pytest.mark.board
def test_this_board_knows_itself() -> None:
    state = ask_board()
    if not state.is_jetson:
        pytest.skip("no Jetson: neither /etc/nv_tegra_release nor a device tree of one")
    assert state.module and state.l4t and state.jetpack and state.power_mode
    assert state.clock("gpu") is not None and state.clock("emc") is not None
    assert state.temperatures_c and state.largest_free_block_bytes
