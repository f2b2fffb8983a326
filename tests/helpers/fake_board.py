"""A Jetson's /proc, /sys, /etc and /var below a folder."""

from pathlib import Path

ORIN_MODES = """< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=MODE_15W >
< POWER_MODEL ID=2 NAME=MODE_30W >
< POWER_MODEL ID=3 NAME=MODE_50W >
< PM_CONFIG DEFAULT=2 >
"""
DPKG = """Package: libnvinfer10
Status: install ok installed
Architecture: arm64
Version: 10.3.0.30-1+cuda12.5
Description: TensorRT runtime libraries

Package: nvidia-l4t-core
Status: install ok installed
Version: 36.4.3-20250107174145

Package: nvidia-jetpack
Status: install ok installed
Version: 6.2+b77

Package: zlib1g
Version: 1.2
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def orin_files(locked: bool = True) -> dict[str, str]:
    """Return the files of an AGX Orin with JetPack 6.2 by name."""
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"
        ", EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
        "etc/nvpmodel.conf": ORIN_MODES,
        "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet\n",
        "var/lib/dpkg/status": DPKG,
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0"
        "nvidia,tegra234\0",
        "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n\n"
        "processor\t: 1\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
        "proc/meminfo": "MemTotal:       64323416 kB\nMemAvailable:   60000000 kB\n"
        "SwapTotal:      32161708 kB\nSwapFree:       32000000 kB\n",
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n"
        "/dev/zram0   partition\t2680140\t100\t5\n/dev/zram1   partition\t2680140\t0\t5\n"
        "/swapfile  file 26801428 0 -2\n",
        "proc/buddyinfo": "Node 0, zone   DMA  1 2 3 4 5 6 7 8 9 10 3\n"
        "Node 0, zone Normal 9 8 7 6 5 4 3 2 1 0 4\n",
        "proc/loadavg": "0.52 0.58 0.59 1/389 12345\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/min_rate": "204000000\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/max_rate": "3199000000\n",
        "sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked": f"{int(locked)}\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "52968\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "47625\n",
        "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone2/temp": "-256000\n",
        "sys/class/thermal/thermal_zone3/type": "PMIC-Die\n",
        "sys/class/thermal/thermal_zone3/temp": "100000\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
        "sys/class/thermal/cooling_device1/cur_state": "0\n",
        "sys/class/hwmon/hwmon2/oc1_event_cnt": "0\n",
        "sys/class/hwmon/hwmon2/oc3_event_cnt": "7\n",
        "sys/class/hwmon/hwmon3/name": "ina3221\n",
        "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
        "sys/class/hwmon/hwmon3/in1_input": "19000\n",
        "sys/class/hwmon/hwmon3/curr1_input": "270\n",
        "sys/class/hwmon/hwmon3/in2_label": "NC\n",
        "sys/class/hwmon/hwmon3/in2_input": "8\n",
        "sys/class/hwmon/hwmon3/curr2_input": "1\n",
        "sys/class/hwmon/hwmon3/in7_label": "Sum of shunt voltages\n",
        "sys/class/hwmon/hwmon3/in7_input": "8\n",
        "sys/class/hwmon/hwmon3/curr7_input": "8\n",
        "sys/class/devfreq/15480000.vic/cur_freq": "115200000\n",
    }
    for core, khz in enumerate((2201600, 2201600)):
        cpu = f"sys/devices/system/cpu/cpu{core}/cpufreq"
        files[f"{cpu}/scaling_governor"] = "schedutil\n"
        files[f"{cpu}/scaling_cur_freq"] = f"{khz}\n"
        files[f"{cpu}/scaling_min_freq"] = f"{khz if locked else 729600}\n"
        files[f"{cpu}/scaling_max_freq"] = f"{khz}\n"
    gpu = "sys/class/devfreq/17000000.gpu"
    files[f"{gpu}/cur_freq"] = "1300500000\n"
    files[f"{gpu}/min_freq"] = f"{1300500000 if locked else 306000000}\n"
    files[f"{gpu}/max_freq"] = "1300500000\n"
    return files


def orin(root: Path, locked: bool = True) -> Path:
    """Write an AGX Orin with JetPack 6.2 below a folder; return the folder."""
    return write(root, orin_files(locked))
