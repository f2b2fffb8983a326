"""`qvla robot`: releases on a robot. Every command may be repeated and answers in JSON."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvla_export.cli.options import Existing
from qvla_export.cli.progress import print_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.install.store import Store

A_ROOT = Existing("root of keys", "copy it from the host's folder of keys: 1.root.json")
StoreOption = Annotated[
    Path, typer.Option("--store", help="The robot's folder of releases.", envvar="QVLA_STORE")
]
NameArgument = Annotated[
    str | None, typer.Argument(help="Name, or start of the digest; default: the newest.")
]
RestartOption = Annotated[
    str | None, typer.Option(help="Unit of systemd to restart if another release serves.")
]
FromOption = Annotated[
    str | None, typer.Option("--from", help="Folder or URL of the repository; given once.")
]
TargetOption = Annotated[
    str | None, typer.Option(help="What this robot is: orin-jp7, cpu ...; given once.")
]
RootOption = Annotated[
    Path | None,
    typer.Option("--root", help="Root of the keys to trust; given once.", callback=A_ROOT.require),
]
GroupOption = Annotated[
    list[str] | None,
    typer.Option("--group", help="Whose releases it takes first: its own, its group's; repeat."),
]
DEFAULT_STORE = Path("/var/lib/qvla")


def install(
    release: NameArgument = None,
    repository: FromOption = None,
    target: TargetOption = None,
    root: RootOption = None,
    groups: GroupOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Fetch a release, check it against its keys and put it beside the others; nothing switches."""
    from jetson.install.installation import InstallRequest
    from jetson.install.installation import install as install_release

    request = InstallRequest(repository, target, root, release, tuple(groups or ()) or None)
    answer(store, lambda opened: install_release(opened, request).to_json())


def build(release: NameArgument = None, store: StoreOption = DEFAULT_STORE) -> None:
    """Build a release's engines for this very machine, where its target has engines."""
    from jetson.install.checking import build_release
    from jetson.install.fingerprint import this_machine

    answer(store, lambda s: build_release(s, release, *this_machine()).to_json())


def verify(
    release: NameArgument = None,
    samples: Annotated[int, typer.Option(min=20, help="Actions that are timed.")] = 100,
    if_changed: Annotated[
        bool,
        typer.Option("--if-changed", help="Only `current`, if machine or runtime changed."),
    ] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Run a release on its golden observations: drift and latency within its limits, or exit 2."""
    from jetson.install.checking import check_release, renew_current
    from jetson.install.fingerprint import this_machine

    if if_changed and release is not None:
        raise QvlaError("--if-changed checks `current`; name no release with it")

    def act(opened: "Store") -> Mapping[str, Any]:
        if not if_changed:
            return check_release(opened, release, *this_machine(), samples).to_json()
        renewed = renew_current(opened, *this_machine(), samples)
        return {"passed": None} if renewed is None else renewed.to_json()

    answer(store, act)


def activate(
    release: NameArgument = None,
    restart_unit: RestartOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Let a checked release be `current`, on probation; the one before stays `previous`."""
    from jetson.install.activation import activate as activate_release
    from jetson.install.fingerprint import this_machine
    from jetson.install.units import restart

    def act(opened: "Store") -> Mapping[str, Any]:
        switched = activate_release(opened, release, *this_machine())
        restart(restart_unit if switched.changed else None)
        return switched.to_json()

    answer(store, act, hold=False)


def rollback(
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "rolled back by hand",
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Only a release on probation; else do nothing.")
    ] = False,
    rebooted: Annotated[
        bool,
        typer.Option("--rebooted", help="Only one whose probation a restart of the machine ended."),
    ] = False,
    restart_unit: RestartOption = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Let `previous` be `current` again; the one that is left counts as failed."""
    from jetson.install import activation
    from jetson.install.store_state import read_boot_id
    from jetson.install.units import restart

    def act(opened: "Store") -> Mapping[str, Any]:
        boot = read_boot_id()
        if rebooted:
            switched = activation.roll_back_after_reboot(opened, boot)
        elif unproven:
            switched = activation.roll_back_unproven(opened, reason, boot)
        else:
            switched = activation.roll_back(opened, reason, boot)
        if switched.changed:
            restart(restart_unit)
        return switched.to_json()

    answer(store, act, hold=False)


def list_releases(store: StoreOption = DEFAULT_STORE) -> None:
    """Name the releases of the store and how far each is."""
    from jetson.install.status import list_releases as releases_of

    answer(store, releases_of, hold=False)


def gc(
    keep: Annotated[int, typer.Option(min=0, help="Proven releases to keep beside them.")] = 1,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Remove what neither `current`, `previous` nor the newest release needs."""
    from jetson.install.garbage import collect
    from jetson.install.store_state import read_boot_id

    answer(store, lambda s: collect(s, keep, read_boot_id()).to_json())


def status(store: StoreOption = DEFAULT_STORE) -> None:
    """Say what serves, whether it is proven, on which machine and how much room there is."""
    from jetson.install.status import read_status

    answer(store, read_status, hold=False)


def answer(root: Path, act: "Callable[[Store], Mapping[str, Any]]", hold: bool = True) -> None:
    """Print what a command did, or why it could not, as JSON; errors end with exit 2 as well."""
    from jetson.install.store import Store

    opened = Store(root)
    try:
        with opened.open() if hold else nullcontext():
            result = act(opened)
    except (QvlaError, OSError) as error:
        refused = getattr(error, "reason", None)
        failure = {"ok": False, "error": " ".join(str(error).split()), "refused": refused}
        print_json(failure)
        raise
    print_json({"ok": True, **result})
