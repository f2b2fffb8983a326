"""`qvla` of a robot whose self-check runs no engine: a release that is called bad fails it."""

import sys
from typing import Any

from jetson.install import update
from jetson.install.checking import FailedCheck
from jetson.install.store import Store
from jetson.install.store_state import StoreState
from qvla_export.cli import main


def check_release(store: Store, digest: str, machine: str, boot_id: str) -> Any:
    state = StoreState.load(store)
    if state.known(digest).name.startswith("bad"):
        state.with_release(digest, standing="failed", reason="it shakes").save(store)
        raise FailedCheck("release fails its check: it shakes")
    state.with_release(digest, standing="checked", machine=machine).save(store)


if __name__ == "__main__":
    update.check_release = check_release  # type: ignore[assignment]  # returns nothing
    sys.argv[0] = "qvla"
    main()
