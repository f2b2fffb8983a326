"""The account that serves: engines are built and checked as it, not as root.

    serving/    in the store; belongs to the account, and holds the key that its engines are sealed
                with (`engines.trt.seal`)

Where a store has this folder, a build or a check that root starts runs as the folder's owner: what
a release brings is parsed and executed without root's rights, and the engines are the server's own.
"""

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson.install.store import Store

SERVING = "serving"


@dataclass(frozen=True)
class ServingAccount:
    """Who serves, where that is not whoever runs a command."""

    uid: int
    name: str
    # Home of its state.
    folder: Path

    @staticmethod
    def of(store: Store) -> "ServingAccount | None":
        """Return a store's account; None where commands run as whoever starts them."""
        folder = store.root / SERVING
        if os.geteuid() != 0 or not folder.is_dir() or (uid := folder.stat().st_uid) == 0:
            return None
        return ServingAccount(uid, pwd.getpwuid(uid).pw_name, folder)

    @property
    def environment(self) -> dict[str, str]:
        """Return what its processes find their state by."""
        return {"HOME": str(self.folder), "XDG_STATE_HOME": str(self.folder)}

    def process(self) -> dict[str, Any]:
        """Return what lets `subprocess.run` start a process as it."""
        group = pwd.getpwuid(self.uid).pw_gid
        groups = os.getgrouplist(self.name, group)
        return {"user": self.uid, "group": group, "extra_groups": groups}

    def own(self, folder: Path) -> None:
        """Let it write into a folder."""
        os.chown(folder, self.uid, -1)
