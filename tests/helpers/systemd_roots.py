"""Systems that boot systemd in a container, for tests of a robot's units.

    python tests/helpers/systemd_roots.py FOLDER

makes them from the mirror that this machine's apt uses, some 500 MB; it wants root and the packages
mmdebstrap, arch-test and systemd-container. Then: QVLA_SYSTEMD=FOLDER make test-slow
"""

import subprocess
import sys
from pathlib import Path

from arm64_roots import mirror

# Suite of Debian -> version of its systemd: on both sides of JetPack 7's 255.
SUITES = {"bookworm": 252, "trixie": 257}
# Python is this machine's own, with what its libraries need.
_PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "openssh-client", "libssl3", "libffi8", "zlib1g",
    "libbz2-1.0", "liblzma5", "libexpat1",
)  # fmt: skip


def make(folder: Path) -> None:
    """Make a system of every suite that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for suite in SUITES:
        root = folder / suite
        if not root.exists():
            words = ["mmdebstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", suite]
            subprocess.run([*words, str(root), mirror()], check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
