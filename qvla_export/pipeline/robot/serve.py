"""Serve a policy from this process until it is told to stop."""

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.pipeline.policy_source import PolicySource

if TYPE_CHECKING:
    from jetson.server_settings import ServerSettings

_LOG = logging.getLogger(__name__)


def serve_policy(source: PolicySource, settings: "ServerSettings") -> None:
    """Open a policy and serve it until SIGTERM or SIGINT; logs what makes this machine slow.

    Raises:
        RefusedRelease: a bundle of a robot's store is not what was signed.
        QvlaError: the policy cannot be opened or does not act, or the address is refused or taken.
    """
    from jetson.board import read_board_state
    from jetson.doctor.speed import slow_settings
    from jetson.install.store import signed_release
    from jetson.server import serve
    from qvla_export.shared.allocator import bound_freed_memory

    # Before there are threads. Requests of strangers are what grows a server's heaps.
    bound_freed_memory()
    if slow := slow_settings(read_board_state()):
        _LOG.warning("slower than it could be, see qvla doctor: %s", slow)
    if signed_release(Path(source.place)) is None:
        _LOG.warning(
            "nobody signed what is served here: its digests find damage, not malice; qvla release "
            "and qvla robot bring signed bundles"
        )
    serve(source(), settings)
    # The process ends: that all it holds is searched for rings first is waited for by the next one.
    gc.freeze()
