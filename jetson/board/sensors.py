"""Temperatures, power rails and throttling, from /sys; and the memory's state from /proc.

Rails are those of the INA3221 and INA238 monitors of Jetsons, readable by root alone on some
releases, or of any other hwmon device that states a power. Throttling is what the kernel's
cooling devices do now, and the hardware's own counters: Jetson's over-current events and the
thermal events of Intel's CPUs.
"""

import re
from pathlib import Path

from jetson.board.files import number_of, paths_in, text_of

# Zones of a Jetson that are switched off say -256 degrees.
_OFF_C = -200.0
# The power controller of older Jetsons has no sensor: its zone says this whatever the weather.
_NO_SENSOR, _NO_SENSOR_C = "pmic", 100.0
_ZONE_ENDING = re.compile(r"[-_](thermal|therm|temp)$")
_RAIL_MONITORS = ("ina3221", "ina226", "ina238")
_FANS = ("fan", "intel_powerclamp")
_PAGE_BYTES = 4096


def read_temperatures_c(root: Path) -> dict[str, float]:
    """Return degrees Celsius by thermal zone, names in lower case: "cpu", "gpu", "tj"."""
    read: dict[str, float] = {}
    for folder in paths_in(root / "sys/class/thermal", "thermal_zone*"):
        value = number_of(folder / "temp")
        name = zone_name(text_of(folder / "type")) or folder.name
        if value is not None and is_measured(name, value / 1000):
            read[name if name not in read else folder.name] = value / 1000
    return read


def zone_name(text: str) -> str:
    """Return a zone's name as newer releases write it: "CPU-therm" and "cpu-thermal" are "cpu"."""
    return _ZONE_ENDING.sub("", text.lower())


def is_measured(zone: str, celsius: float) -> bool:
    """Say whether a zone's temperature comes from a sensor that is switched on."""
    constant = zone.startswith(_NO_SENSOR) and celsius == _NO_SENSOR_C
    return celsius > _OFF_C and not constant


def read_rails_mw(root: Path) -> dict[str, float]:
    """Return milliwatts by power rail."""
    read: dict[str, float] = {}
    for folder in paths_in(root / "sys/class/hwmon", "hwmon*"):
        device = text_of(folder / "name")
        if device in _RAIL_MONITORS:
            for label in paths_in(folder, "in[0-9]*_label"):
                mw = _rail_mw(folder, label.name.removeprefix("in").removesuffix("_label"))
                if mw is not None and is_rail(text_of(label)):
                    read[text_of(label)] = mw
        for power in paths_in(folder, "power[0-9]*_input"):
            microwatts = number_of(power)
            if microwatts is not None:
                label_text = text_of(power.with_name(power.name.replace("_input", "_label")))
                read[label_text or device or folder.name] = microwatts / 1e3
    return read


def _rail_mw(folder: Path, channel: str) -> float | None:
    millivolts = number_of(folder / f"in{channel}_input")
    milliamperes = number_of(folder / f"curr{channel}_input")
    if millivolts is None or milliamperes is None:
        return None
    return round(millivolts * milliamperes / 1000, 1)


def is_rail(label: str) -> bool:
    """Say whether a monitor's channel is a power rail."""
    # "NC" is not connected; the monitor's own sum is no rail.
    return label not in ("", "NC") and "sum of shunt" not in label.lower()


def read_throttling(root: Path) -> tuple[str, ...]:
    """Return what slows the machine down now."""
    active = set()
    for folder in paths_in(root / "sys/class/thermal", "cooling_device*"):
        name = text_of(folder / "type")
        if (number_of(folder / "cur_state") or 0) > 0 and not any(fan in name for fan in _FANS):
            active.add(name)
    return tuple(sorted(active))


def read_throttle_counts(root: Path) -> dict[str, int]:
    """Return how often the hardware slowed down since boot, by counter."""
    counters = paths_in(root / "sys/class/hwmon", "hwmon*/oc[0-9]*_event_cnt")
    read = {path.name.removesuffix("_event_cnt"): number_of(path) for path in counters}
    cpus = root / "sys/devices/system/cpu"
    for name in ("core_throttle_count", "package_throttle_count"):
        counts = [number_of(path) for path in paths_in(cpus, f"cpu[0-9]*/thermal_throttle/{name}")]
        if counts:
            read[name] = max(count or 0 for count in counts)
    return {name: int(count) for name, count in read.items() if count is not None}


def read_zram_bytes(root: Path) -> int:
    """Return the bytes of swap that is compressed memory; 0 without any."""
    swaps = re.findall(r"^/dev/zram\S*\s+\S+\s+(\d{1,15})", text_of(root / "proc/swaps"), re.M)
    return sum(int(kilobytes) for kilobytes in swaps) * 1024


def read_largest_free_block(root: Path) -> tuple[int | None, int | None]:
    """Return the bytes of the largest contiguous free block, and how many there are of its size.

    What tegrastats calls "lfb".
    """
    counts = read_free_blocks(root)
    largest = max((nbytes for nbytes, count in counts.items() if count), default=None)
    return (None, None) if largest is None else (largest, counts[largest])


def read_free_blocks(root: Path) -> dict[int, int]:
    """Return how many free blocks of physically contiguous memory there are, by bytes.

    /proc/buddyinfo counts free blocks of 1, 2, 4, ... pages; empty if it cannot be read.
    """
    rows = [
        [int(count) for count in counts.split()]
        for counts in re.findall(
            r"^Node\s+\d+,\s+zone\s+\S+((?:\s+\d{1,15})+)\s*$",
            text_of(root / "proc/buddyinfo"),
            re.M,
        )
    ]
    totals = (sum(counts) for counts in zip(*_pad(rows), strict=True))
    return {_PAGE_BYTES << order: count for order, count in enumerate(totals)}


def _pad(rows: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, rows), default=0)
    return [row + [0] * (longest - len(row)) for row in rows]
