"""Whose keys vouch for groups, now and ever, as far as this robot has seen.

Roots are kept one by one, and say which keys signed once; of the lists, which name the groups'
keys, only the newest is kept. Without a note of their own a key that was replaced would look like a
stranger's. The note only names a refusal: nothing is believed because of it.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Delegations, Metadata, Targets

from jetson.install.release import GROUP_NAME
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import read_json

NOTE = "group_keys.json"
_LIST = "targets.json"


def delegations_of(everyone: Targets) -> Any:
    """Return what everyone's list says of groups; empty where it says nothing."""
    found = everyone.delegations
    return Delegations({}, {}) if found is None or found.roles is None else found


def group_names(everyone: Targets) -> tuple[str, ...]:
    """Return the groups that everyone's list names."""
    return tuple(name for name in delegations_of(everyone).roles if GROUP_NAME.fullmatch(name))


def group_roles(folder: Path) -> dict[str, Any]:
    """Return the groups' roles by name, of the list in a folder of metadata."""
    with contextlib.suppress(OSError, RepositoryError):
        everyone = Metadata[Targets].from_bytes((folder / _LIST).read_bytes()).signed
        roles = delegations_of(everyone).roles
        return {name: roles[name] for name in group_names(everyone)}
    return {}


def keys_ever(trust: Path, work: Path) -> dict[str, set[str]]:
    """Return the ids of all keys that this robot has seen vouch for groups.

    Args:
        trust: the store's folder of what was seen last.
        work: what is seen now.
    """
    ever: dict[str, set[str]] = {}
    for group, ids in _note(trust).items():
        ever.setdefault(group, set()).update(ids)
    for folder in (trust, work):
        for group, role in group_roles(folder).items():
            ever.setdefault(group, set()).update(role.keyids)
    return ever


def note_keys(trust: Path, ever: Mapping[str, set[str]]) -> None:
    """Keep what `keys_ever` returned for the next time."""
    if ever:
        write_json(trust / NOTE, {group: sorted(ever[group]) for group in sorted(ever)})


def _note(trust: Path) -> dict[str, list[str]]:
    path = trust / NOTE
    if not path.is_file():
        return {}
    try:
        value = read_json(path, "note of keys")
    except QvlaError:
        return {}  # made anew from what is seen
    entries = value.items() if isinstance(value, dict) else ()
    return {str(k): [str(one) for one in v] for k, v in entries if isinstance(v, list)}
