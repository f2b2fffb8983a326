"""`qvla robot prove`, `supervise` and `units`: a release that serves, and what keeps it serving."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvla_export.cli.progress import print_json
from qvla_export.cli.robot.serve_options import TokenFileOption
from qvla_export.cli.robot.store import (
    DEFAULT_STORE,
    FromOption,
    GroupOption,
    NameArgument,
    RestartOption,
    RootOption,
    StoreOption,
    TargetOption,
    answer,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jetson.install.store import Store

ActionsOption = Annotated[int, typer.Option(min=1, help="Actions of a probation.")]
SecondsOption = Annotated[float, typer.Option(min=0, help="Time over which they are spread.")]
LatencyOption = Annotated[
    float | None, typer.Option(help="Longest of 95 in 100 of them as a client sees it, ms.")
]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")]
ServeOptions = Annotated[
    list[str] | None, typer.Argument(help="After --: further options of qvla serve.")
]


def prove(
    url: Annotated[
        str | None, typer.Option(help="Server of `current`, measured first; default: believed.")
    ] = None,
    actions: ActionsOption = 20,
    seconds: SecondsOption = 10.0,
    max_p95_ms: LatencyOption = None,
    unless_proven: Annotated[
        bool, typer.Option("--unless-proven", help="Do nothing if nothing is on probation.")
    ] = False,
    or_rollback: Annotated[
        bool, typer.Option("--or-rollback", help="Leave a release that fails, and end with 0.")
    ] = False,
    restart_unit: RestartOption = None,
    token_file: TokenFileOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """End the probation of `current`, measured by a client: others may go back to it."""
    from jetson.install.probation import ProbationTerms, prove_current, prove_or_leave
    from jetson.install.store_state import StoreState
    from jetson.install.units import restart
    from jetson.serving.security import read_token

    def act(opened: "Store") -> "Mapping[str, object]":
        if unless_proven and StoreState.load(opened).probation is None:
            return {"measured": None}
        terms, token = ProbationTerms(actions, seconds, max_p95_ms), read_token(token_file)
        if not or_rollback or url is None:
            return prove_current(opened, url, terms, token).to_json()
        proof = prove_or_leave(opened, url, terms, token)
        restart(restart_unit if proof.switched.changed else None)
        return proof.to_json()

    answer(store, act, hold=False)


def update(
    release: NameArgument = None,
    repository: FromOption = None,
    target: TargetOption = None,
    root: RootOption = None,
    groups: GroupOption = None,
    restart_unit: RestartOption = None,
    proven_within: Annotated[
        float | None, typer.Option(min=0, help="Wait so many seconds until it is proven.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Install, check and activate the newest release; one that failed here is not tried again."""
    from jetson.install.fingerprint import this_machine
    from jetson.install.installation import InstallRequest
    from jetson.install.units import restart
    from jetson.install.update import await_proof
    from jetson.install.update import update as update_store

    request = InstallRequest(repository, target, root, release, tuple(groups or ()) or None)

    def act(opened: "Store") -> "Mapping[str, object]":
        with opened.open():
            updated = update_store(opened, request, *this_machine())
        if updated.changed:
            restart(restart_unit)
        return await_proof(opened, updated, proven_within).to_json()

    answer(store, act, hold=False)


def supervise(
    serve_options: ServeOptions = None,
    port: PortOption = 8000,
    actions: ActionsOption = 20,
    seconds: SecondsOption = 10.0,
    max_p95_ms: LatencyOption = None,
    token_file: TokenFileOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Keep `current` serving without systemd: proven, started again, left where it fails."""
    import signal
    from threading import Event

    from jetson.install.probation import ProbationTerms
    from jetson.install.store import Store
    from jetson.install.supervision import SupervisionSettings, serve_command
    from jetson.install.supervision import supervise as keep_serving
    from jetson.serving.security import read_token

    token_words = [] if token_file is None else ["--token-file", str(token_file)]
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    settings = SupervisionSettings(
        serve_command(port, [*token_words, *(serve_options or ())]),
        f"http://127.0.0.1:{port}",
        ProbationTerms(actions, seconds, max_p95_ms),
        read_token(token_file),
    )
    keep_serving(Store(store), settings, stopping)


def units(
    output: Annotated[Path, typer.Option("--output", help="Folder: /etc/systemd/system.")],
    serve_options: ServeOptions = None,
    port: PortOption = 8000,
    user: Annotated[str, typer.Option(help="Account that serves.")] = "qvla",
    power_mode: Annotated[
        int | None, typer.Option(min=0, help="nvpmodel's mode, set at the first boot.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write systemd units: first boot, clocks, serving, going back, an optional timer."""
    from jetson.install.units import UnitSettings, write_units

    options = tuple(serve_options or ())
    settings = UnitSettings(Path(sys.executable), store, user, port, options, power_mode)
    written = write_units(output, settings)
    print_json({"ok": True, "units": [str(path) for path in written]})
