"""`qvla doctor` on boards: each setting made wrong alone is exactly what is named."""

import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from fake_board import write
from good_boards import BOARDS, MEMINFO, answer, board, jetpack6_files, read, to_mend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetson.board.state import UNKNOWN, BoardState
from jetson.doctor import memory, power
from jetson.doctor.examination import DoctorRequest, examine, read_subject
from jetson.doctor.finding import BoardFinding, Check, count, sort_findings, summary
from jetson.doctor.machine import Machine, read_machine
from jetson.doctor.speed import slow_settings

_CPU = "sys/devices/system/cpu/cpu1/cpufreq"
_LITTLE = MEMINFO.replace("64323416", "7800000").replace("60000000", "7000000")
_ZRAM = "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0   partition\t3900000\t0\t5\n"
_COOLING = "sys/class/thermal/cooling_device1"
# Name -> files that are wrong, the setting they belong to, what mends it.
WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    "cpu unlocked": ({f"{_CPU}/scaling_min_freq": "729600"}, "clocks locked", "sudo jetson_clocks"),
    "mode": ({"var/lib/nvpmodel/status": "pmode:0001"}, "power mode", "sudo nvpmodel -m 0 "),
    "hot": ({f"{_COOLING}/cur_state": "3"}, "throttling now", "sudo jetson_clocks --fan"),
    "over current": (
        {"sys/class/hwmon/hwmon2/oc1_event_cnt": "4"}, "over-current events", "power supply",
    ),
    "little memory": ({"proc/meminfo": _LITTLE}, "swap", "sudo fallocate -l 16G /swapfile && "),
    "compressed only": (
        {
            "proc/meminfo": _LITTLE.replace("SwapTotal:              0", "SwapTotal: 3900000"),
            "proc/swaps": _ZRAM,
        },
        "swap",
        "sudo systemctl disable --now nvzramconfig; sudo fallocate",
    ),
    "in pieces": (
        {"proc/buddyinfo": "Node 0, zone Normal 90000 90000 90000 90000 5 4 3 2 1 0 37\n"},
        "contiguous memory",
        "echo 1 > /proc/sys/vm/compact_memory",
    ),
    "in pieces, small CMA": (
        {"proc/buddyinfo": "Node 0, zone Normal 90000 90000 90000 90000 5 4 3 2 1 0 37\n"},
        "contiguous memory",
        "/ s/$/ cma=512M/' /boot/extlinux/extlinux.conf && sudo reboot",
    ),
    "in pieces, no CMA": (
        {
            "proc/buddyinfo": "Node 0, zone Normal 90000 90000 90000 90000 5 4 3 2 1 0 37\n",
            "proc/meminfo": "\n".join(
                line for line in MEMINFO.splitlines() if not line.startswith("Cma")
            ),
        },
        "contiguous memory",
        "keep 512 MB for devices: ",
    ),
    "no CMA": (
        {"proc/meminfo": MEMINFO.replace("200000", "1000")}, "CMA memory", "/ s/$/ cma=512M/'",
    ),
    "release": (
        {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.7, GCID: 1"},
        "Jetson Linux",
        "sudo apt dist-upgrade",
    ),
}  # fmt: skip
# Where Thor keeps what an Orin has elsewhere.
GPU_UNLOCKED = {
    "jetpack5": "sys/class/devfreq/17000000.ga10b/min_freq",
    "jetpack6": "sys/class/devfreq/17000000.gpu/min_freq",
    "jetpack7": "sys/class/devfreq/17000000.gpu/min_freq",
    "thor": "sys/class/devfreq/gpu-gpc-0/min_freq",
}


def look(machine: Machine, port: int = 0) -> tuple[BoardFinding, ...]:
    """Return the findings on a machine; port 0 is always free."""
    question = DoctorRequest(port=port)
    clean = replace(machine, packages={"onnxruntime": "1.32.0"})
    return examine(question, read_subject(question, clean))


@pytest.mark.parametrize("name", BOARDS)
def test_a_good_board_has_nothing_to_mend(tmp_path: Path, name: str) -> None:
    findings = look(board(tmp_path, name))
    assert not to_mend(findings)
    looked_at = {finding.what for finding in findings if finding.severity == "ok"}
    assert {
        "clocks locked",
        "power mode",
        "throttling now",
        "swap",
        "contiguous memory",
    } < looked_at
    assert {"CMA memory", "Jetson Linux", "system clock"} < looked_at
    assert summary(findings) == ""


@pytest.mark.parametrize("name", BOARDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_setting_is_named_alone(tmp_path: Path, name: str, wrong: str) -> None:
    changes, what, remedy = WRONG[wrong]
    findings = to_mend(look(board(tmp_path, name, changes)))
    assert list(findings) == [what]
    assert findings[what].severity == "warning"
    assert remedy in findings[what].remedy


@pytest.mark.parametrize("name", BOARDS)
def test_a_gpu_that_clocks_down_is_named_with_its_range(tmp_path: Path, name: str) -> None:
    findings = to_mend(look(board(tmp_path, name, {GPU_UNLOCKED[name]: "306000000"})))
    assert list(findings) == ["clocks locked"]
    assert "gpu 306 to" in findings["clocks locked"].observed


def test_the_fastest_mode_is_the_board_s_own(tmp_path: Path) -> None:
    modes = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    machine = board(tmp_path, "jetpack6", {"etc/nvpmodel.conf": modes})
    finding = power.check_power_mode(machine)
    assert (finding.observed, finding.wanted) == ("15W", "MAXN_SUPER")
    assert finding.remedy.startswith("sudo nvpmodel -m 2 ")


def test_engines_belong_to_a_power_mode(tmp_path: Path) -> None:
    machine = board(tmp_path, "jetpack6")
    assert power.check_power_mode(machine, "MAXN").severity == "ok"
    finding = power.check_power_mode(machine, "MODE_30W", "qvla build BUNDLE")
    assert finding.observed == "MAXN, engines were built in MODE_30W"
    assert finding.remedy == "qvla build BUNDLE"
    assert power.check_power_mode(machine, "30W").remedy == "sudo nvpmodel -m 2"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"var/lib/nvpmodel/status": "?"}, "power mode"),
        ({"etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >"}, "power mode"),
        ({"proc/buddyinfo": ""}, "contiguous memory"),
        ({"proc/meminfo": ""}, "swap"),
    ],
)
def test_what_cannot_be_read_is_unknown_not_right(
    tmp_path: Path, changes: Mapping[str, str], what: str
) -> None:
    finding = to_mend(look(board(tmp_path, "jetpack6", changes)))[what]
    assert (finding.severity, bool(finding.remedy)) == ("unknown", True)


def test_a_clock_that_follows_no_server_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, jetpack6_files())
    replies = {"yes\n": "ok", "no\n": "warning", "": "unknown", "maybe": "unknown"}
    for reply, severity in replies.items():
        machine = read(root, lambda command, reply=reply: answer(command) and reply)
        [finding] = [f for f in look(machine) if f.what == "system clock"]
        assert finding.severity == severity
    write(root, {"run/systemd/timesync/synchronized": ""})
    assert read(root, lambda command: "").clock_synchronized is True


def test_a_plain_machine_says_what_does_not_apply(tmp_path: Path) -> None:
    governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    files = {"proc/meminfo": MEMINFO, governor: "powersave\n"}
    findings = look(read(write(tmp_path, files)))
    assert list(to_mend(findings)) == ["CPU governor"]
    assert "echo performance | sudo tee" in to_mend(findings)["CPU governor"].remedy
    applies = {finding.what: finding.severity for finding in findings}
    jetson_only = ("clocks locked", "power mode", "contiguous memory", "CMA memory", "Jetson Linux")
    assert {applies[what] for what in jetson_only} == {"not applicable"}
    write(tmp_path, {governor: "performance\n"})
    assert not to_mend(look(read(tmp_path)))
    held = {f"scaling_{end}_freq": "3000000" for end in ("min", "max")}
    folder = governor.rpartition("/")[0]
    write(tmp_path, {governor: "powersave", **{f"{folder}/{n}": t for n, t in held.items()}})
    assert not to_mend(look(read(tmp_path)))


def test_heat_of_the_past_is_counted(tmp_path: Path) -> None:
    counter = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    for number, severity in (("0", "ok"), ("12", "warning")):
        machine = read(write(tmp_path, {"proc/meminfo": MEMINFO, counter: number}))
        assert power.check_throttled(machine.board).severity == severity


def test_swap_on_disk_is_enough_beside_compressed_memory() -> None:
    small = replace(
        UNKNOWN, memory_total_bytes=8 << 30, swap_total_bytes=20 << 30, zram_bytes=4 << 30
    )
    assert memory.check_swap(small).severity == "ok"
    assert memory.check_swap(replace(small, zram_bytes=20 << 30)).severity == "warning"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_files_never_end_the_doctor(tmp_path: Path, data: st.DataObject) -> None:
    root = tmp_path / "board"
    shutil.rmtree(root, ignore_errors=True)
    name = data.draw(st.sampled_from(sorted(BOARDS)))
    write(root, BOARDS[name]())
    places = sorted(path for path in root.rglob("*") if path.is_file())
    for path in data.draw(st.lists(st.sampled_from(places), unique=True, min_size=1)):
        _spoil(
            path,
            data.draw(st.sampled_from(("binary", "missing", "folder", "link", "digits"))),
            data,
        )
    printed = data.draw(st.text(max_size=60))
    findings = look(read_machine(root, lambda command: printed, lambda: UNKNOWN, lambda: None))
    assert all(f.remedy for f in findings if f.severity in ("error", "warning", "unknown"))
    assert json.loads(json.dumps([f.to_json() for f in findings], allow_nan=False))


def _spoil(path: Path, how: str, data: st.DataObject) -> None:
    path.unlink()
    if how == "binary":
        path.write_bytes(data.draw(st.binary(max_size=80)))
    elif how == "folder":
        path.mkdir()
    elif how == "link":
        # Reading it fails as a file of root's does.
        path.symlink_to(path)
    elif how == "digits":
        path.write_text(
            data.draw(st.sampled_from(("9" * 5000, f"MemTotal: {'9' * 5000} kB", "-1")))
        )


def test_a_machine_of_which_nothing_is_known_can_be_examined() -> None:
    findings = look(Machine())
    assert count(findings, "error") == 0
    assert {f.what for f in findings} == {f.what for f in look(Machine(board=_jetson()))}


def _jetson() -> BoardState:
    return replace(UNKNOWN, l4t="36.4.3")


def test_one_line_says_what_makes_figures_slow(tmp_path: Path) -> None:
    assert slow_settings(board(tmp_path, "jetpack6").board, tmp_path) == ""
    changes = WRONG["mode"][0] | WRONG["cpu unlocked"][0] | WRONG["little memory"][0]
    line = slow_settings(board(tmp_path, "jetpack6", changes).board, tmp_path)
    assert line.startswith("clocks locked: cpu1 730 to 2202 MHz (sudo jetson_clocks); power mode: ")
    assert "swap" not in line


def test_a_finding_without_a_remedy_is_refused() -> None:
    check = Check("clocks", "why")
    for make in (check.error, check.warning, check.unknown):
        with pytest.raises(ValueError, match="needs a remedy"):
            make("seen", "")
    made = (
        check.ok("a"),
        check.warning("b", "do"),
        check.inapplicable("c"),
        check.error("d", "do"),
    )
    assert [f.severity for f in sort_findings(made)] == [
        "error",
        "warning",
        "ok",
        "not applicable",
    ]
    assert summary(made) == "clocks: d (do); clocks: b (do)"


def test_a_port_in_use_is_named() -> None:
    assert "server port" not in to_mend(look(Machine()))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        finding = to_mend(look(Machine(), port))["server port"]
    assert (finding.severity, finding.wanted) == ("warning", "free")
    assert f"--port {port + 1}" in finding.remedy
