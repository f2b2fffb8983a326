"""`qvla keys`: who may sign releases."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import Existing
from qvla_export.cli.progress import print_json

SOME_KEYS = Existing("folder of keys", "make them first with: qvla keys new")
KeysArgument = Annotated[Path, typer.Argument(help="Folder of keys.", callback=SOME_KEYS.require)]
DaysOption = Annotated[int, typer.Option("--days", min=1, help="Until the new root expires.")]


def new(
    folder: Annotated[Path, typer.Argument(help="New folder of keys.")],
    root_keys: Annotated[int, typer.Option(min=1, help="Keys of the root.")] = 3,
    root_threshold: Annotated[int, typer.Option(min=1, help="Root keys that must sign.")] = 2,
    targets_keys: Annotated[int, typer.Option(min=1, help="Keys of release engineers.")] = 1,
    targets_threshold: Annotated[int, typer.Option(min=1, help="Engineers that must sign.")] = 1,
    days: DaysOption = 365,
) -> None:
    """Make the keys of every role and 1.root.json, which robots are given; prints JSON."""
    from qvla_export.pipeline.release.groups import describe
    from qvla_export.pipeline.release.keys import KeyPolicy, new_keys

    policy = KeyPolicy(root_keys, root_threshold, targets_keys, targets_threshold, days)
    new_keys(folder, policy)
    print_json(describe(folder))


def delegate(
    folder: KeysArgument,
    group: Annotated[str, typer.Argument(help="What robots are called together, or one robot.")],
    keys: Annotated[int, typer.Option(min=1, help="Keys of the group.")] = 1,
    threshold: Annotated[int, typer.Option(min=1, help="Of them that must sign.")] = 1,
) -> None:
    """Make the keys of a group, who vouch for its releases alone; prints JSON."""
    from qvla_export.pipeline.release.groups import describe, new_group

    new_group(folder, group, keys, threshold)
    print_json(describe(folder))


def rotate(
    folder: KeysArgument,
    role: Annotated[
        str, typer.Argument(help="root, targets, snapshot, timestamp or a group: whose keys.")
    ],
    days: DaysOption = 365,
) -> None:
    """Replace every key of a role; sign and publish again after it. Prints JSON."""
    from qvla_export.pipeline.release.groups import describe
    from qvla_export.pipeline.release.groups import rotate as rotate_keys

    rotate_keys(folder, role, days)
    print_json(describe(folder))


def revoke(
    folder: KeysArgument,
    key: Annotated[str, typer.Argument(help="Start of the key's id, six digits at least.")],
    days: DaysOption = 365,
) -> None:
    """Take the right to sign from a key and give it to a new one. Prints JSON."""
    from qvla_export.pipeline.release.groups import describe
    from qvla_export.pipeline.release.groups import revoke as revoke_key

    revoke_key(folder, key, days)
    print_json(describe(folder))
