"""Container images that buildah really builds, and a base for them.

    python tests/helpers/built_images.py localhost/qvla-base

makes the base, what Docker's `debian:bookworm-slim` is, from the mirror that this machine's apt
uses; it wants root and the packages mmdebstrap, arch-test and buildah. Then:
QVLA_IMAGE_BASE=localhost/qvla-base pytest -m slow -s tests/end_to_end/test_images.py
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm64_roots import mirror
from places import ROOT

# Of an image's own user.
USER = 10001
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
_AUTHORITIES = "etc/ssl/certs/ca-certificates.crt"
# What only once merged /usr, and what it was written in: no slim image has it.
_SPENT = ("usrmerge", "perl", "perl-modules-5.36", "libperl5.36")
_UNREAD = ("doc", "man", "info", "locale", "lintian")
# Runs words as the image's user on a root that is read-only, without network but for loopback.
_SEALED = """
set -e
root=$1 state=$2 input=$3
shift 3
ip link set lo up
mount --bind "$root" /mnt
mount -o remount,ro,bind /mnt
mount -t tmpfs tmpfs /mnt/tmp
mount -t tmpfs -o uid=10001 tmpfs "/mnt$state"
mount -t proc proc /mnt/proc
mount --rbind /dev /mnt/dev
mount --bind "$input" /mnt/mnt
exec chroot --userspec=10001:10001 /mnt "$@"
"""


def buildah(*words: str | Path) -> str:
    """Run buildah; return what it said."""
    done = subprocess.run(
        ["buildah", *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, f"{words[0]}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


@dataclass(frozen=True)
class BuiltImage:
    """An image, and a container of it whose files can be looked at."""

    name: str
    container: str
    root: Path
    config: dict[str, Any]

    @classmethod
    def build(cls, name: str, dockerfile: str, base: str, wheels: Path | None) -> "BuiltImage":
        """Build an image of this checkout on a base.

        Args:
            name: of the image.
            dockerfile: relative to the checkout.
            base: image in buildah's storage that can fetch packages, of apt and of pip.
            wheels: folder that pip prefers to its index; None for none.
        """
        words = ["bud", "--isolation=chroot", "--format=docker", f"--build-arg=BASE={base}"]
        with tempfile.TemporaryDirectory() as folder:
            if wheels is not None:
                settings = Path(folder) / "pip.conf"
                settings.write_text("[global]\nfind-links = /wheels\n")
                words += [f"--volume={settings}:/etc/pip.conf:ro", f"--volume={wheels}:/wheels:ro"]
            buildah(*words, "--tag", name, "--file", dockerfile, ".")
        container = buildah("from", name)
        said = json.loads(buildah("inspect", "--type", "image", name))
        return cls(name, container, Path(buildah("mount", container)), said["Docker"]["config"])

    @property
    def nbytes(self) -> float:
        """Return the bytes of all its layers, as `docker images` counts them."""
        size = json.loads(buildah("images", "--json", self.name))[0]["size"]
        number, unit = size.split()
        return float(number) * _UNITS[unit]

    def run(self, *words: str, volumes: tuple[str, ...] = ()) -> str:
        """Run a command as the image's own user; return what it said."""
        mounts = [f"--volume={volume}" for volume in volumes]
        return buildah("run", "--isolation=chroot", *mounts, self.container, "--", *words)

    def run_sealed(self, words: Sequence[str], mounted: Path) -> str:
        """Run a command where only /tmp and the image's volume can be written.

        Args:
            words: of the command.
            mounted: folder that the container has as /mnt.
        """
        (volume,) = self.config["Volumes"]
        script = ["sh", "-c", _SEALED, "sealed", str(self.root), volume, str(mounted)]
        done = subprocess.run(
            ["unshare", "--mount", "--net", *script, "env", "-i", *self.config["Env"], *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def remove(self) -> None:
        """Remove the container and the image."""
        buildah("rm", self.container)
        buildah("rmi", self.name)


def lacking() -> str | None:
    """Return why no image can be built here; None if one can."""
    if os.geteuid() != 0:
        return "needs root, to look into an image"
    return None if shutil.which("buildah") else "needs buildah: Debian's package buildah"


def make_base(name: str) -> None:
    """Make a base image of Debian 12 without documentation, which trusts whom this machine does."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base.tar"
        words = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates,usr-is-merged"]
        words += [f"--dpkgopt=path-exclude=/usr/share/{unread}/*" for unread in _UNREAD]
        purge = f"apt-get --yes --auto-remove purge {' '.join(_SPENT)}"
        words += [f'--customize-hook=chroot "$1" {purge}']
        subprocess.run([*words, "bookworm", str(tree), mirror()], check=True)
        container = buildah("from", "scratch")
        buildah("add", container, tree, "/")
        buildah("add", container, f"/{_AUTHORITIES}", f"/{_AUTHORITIES}")
        buildah("commit", "--rm", container, name)


if __name__ == "__main__":
    make_base(sys.argv[1])
