"""The noun `Group`: robots, or one alone, that get releases of their own by keys of their own.

A group is a delegation of TUF (specification 1.0.33, section 3.1): everyone's list, which the
targets keys sign, says whose keys may vouch for the group's releases and for nothing else. What
the folder of keys knows of groups lies in groups.json; it is not secret.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import Key, Signer
from tuf.api.metadata import (
    TOP_LEVEL_ROLE_NAMES,
    DelegatedRole,
    Delegations,
    Role,
    Root,
    Targets,
)

from jetson.install.release import GROUP_NAME
from jetson.install.trust import group_release_name
from qvla_export.pipeline.release.keys import (
    ROLES,
    KeyRing,
    KeyRingError,
    find_key,
    key_path,
    load_signers,
    new_signer,
    require_enough,
    retire_keys,
    revoke_key,
    rotate_keys,
)
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.json_documents import Node, read_json

GROUPS = "groups.json"
FORMAT = "qvla-groups-1"


@dataclass(frozen=True)
class Group:
    """Who vouches for a group's releases."""

    name: str
    # Public, by id.
    keys: Mapping[str, Key]
    threshold: int = 1


@dataclass(frozen=True)
class Signatory:
    """Who must sign a list of releases: the targets keys everyone's, a group's keys its own."""

    # What names the list in the repository: "targets", or the group.
    name: str
    delegator: Root | Targets
    folder: Path

    @property
    def role(self) -> Role:
        """Its keys and how many must sign."""
        return self.delegator.get_delegated_role(self.name)

    def signers(self) -> list[Signer]:
        """Return those whose private keys lie here."""
        return load_signers(self.folder, self.name, self.role.keyids)

    def require_signers(self) -> list[Signer]:
        """Return enough signers.

        Raises:
            KeyRingError: too few private keys lie here.
        """
        return require_enough(self.folder, self.name, self.role)


def signatory_of(ring: KeyRing, group: str = "") -> Signatory:
    """Return who must sign everyone's list, or a group's.

    Raises:
        KeyRingError: there is no such group.
    """
    if not group:
        return Signatory("targets", ring.root, ring.folder)
    groups = load_groups(ring.folder)
    if group not in groups:
        raise KeyRingError(
            f"{ring.folder} knows no group {group!r:.80}, only {sorted(groups)}; make it with: "
            f"qvla keys delegate {ring.folder} {group:.80}"
        )
    targets = Targets()
    delegate(targets, {group: groups[group]})
    return Signatory(group, targets, ring.folder)


def load_groups(folder: Path) -> dict[str, Group]:
    """Return the groups of a folder of keys, in the order in which they were made.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / GROUPS
    if not path.is_file():
        return {}
    top = Node(read_json(path, "groups of keys"), str(path), remedy="copy the folder of keys again")
    if top.field("format").value != FORMAT:
        raise top.field("format").wrong(f"{FORMAT} is needed")
    return {name: _group(name, node) for name, node in top.field("groups").fields().items()}


def _group(name: str, node: Node) -> Group:
    keys = {}
    for keyid, value in node.field("keys").fields().items():
        try:
            keys[keyid] = Key.from_dict(keyid, dict(value.value))
        except (KeyError, TypeError, ValueError):
            raise value.wrong("a public key is needed") from None
    if GROUP_NAME.fullmatch(name) is None:
        raise node.wrong(f"a group's name must match {GROUP_NAME.pattern}")
    return Group(name, keys, node.field("threshold").whole(1, max(1, len(keys))))


def new_group(folder: Path, name: str, keys: int = 1, threshold: int = 1) -> Group:
    """Make the keys of a group; the next list that is published says that they may sign.

    Raises:
        KeyRingError: there is one of this name, or the name or the threshold is none.
    """
    KeyRing.load(folder)
    groups = load_groups(folder)
    if GROUP_NAME.fullmatch(name) is None or name in TOP_LEVEL_ROLE_NAMES:
        raise KeyRingError(
            f"a group's name must match {GROUP_NAME.pattern} and be none of {ROLES}, got "
            f"{name!r:.80}"
        )
    if name in groups:
        raise KeyRingError(f"{folder} has a group {name!r}; replace its keys: qvla keys rotate")
    if not 1 <= threshold <= keys <= 32:
        raise KeyRingError(f"{name}: a threshold of {threshold} with {keys} keys; 1 to 32 of them")
    public = [new_signer(folder, name).public_key for _ in range(keys)]
    group = Group(name, {key.keyid: key for key in public}, threshold)
    _save(folder, {**groups, name: group})
    return group


def delegate(targets: Targets, groups: Mapping[str, Group]) -> None:
    """Let everyone's list say whose keys vouch for groups; those that it names besides stay."""
    found = targets.delegations or Delegations({}, {})
    roles = found.roles or {}
    keys = dict(found.keys)
    for group in groups.values():
        # Files are named by their digests: whoever may name one cannot change another's.
        paths = [group_release_name(group.name, "*").removesuffix(".json"), "blobs/*", "deltas/*"]
        roles[group.name] = DelegatedRole(
            group.name, list(group.keys), group.threshold, terminating=True, paths=paths
        )
        keys |= group.keys
    if roles:
        used = {keyid for role in roles.values() for keyid in role.keyids}
        targets.delegations = Delegations({k: key for k, key in keys.items() if k in used}, roles)


def rotate(folder: Path, role: str, days: int = 365) -> None:
    """Replace every key of a role, or of a group; sign and publish again after it.

    Raises:
        KeyRingError: there is none of this name, or too few of the root's keys lie here.
    """
    for known in ROLES:
        if role == known:
            rotate_keys(folder, known, days)
            return
    groups = load_groups(folder)
    if role not in groups:
        raise KeyRingError(f"{role!r:.80} must be one of {[*ROLES, *groups]}")
    _replace(folder, groups, role, list(groups[role].keys))


def revoke(folder: Path, key: str, days: int = 365) -> None:
    """Take the right to sign from one key, of a role or of a group, and give it to a new one.

    Raises:
        KeyRingError: no key, or several, begin so; or too few of the root's private keys lie here.
    """
    groups = load_groups(folder)
    ring = KeyRing.load(folder)
    keys: dict[str, list[str]] = {role: list(ring.root.roles[role].keyids) for role in ROLES}
    keys |= {name: list(group.keys) for name, group in groups.items()}
    role, keyid = find_key(keys, key)
    if role in groups:
        _replace(folder, groups, role, [keyid])
    else:
        revoke_key(folder, key, days)


def _replace(folder: Path, groups: dict[str, Group], name: str, leaving: list[str]) -> None:
    group = groups[name]
    keys = {keyid: key for keyid, key in group.keys.items() if keyid not in leaving}
    for _ in leaving:
        key = new_signer(folder, name).public_key
        keys[key.keyid] = key
    _save(folder, {**groups, name: Group(name, keys, group.threshold)})
    retire_keys(folder, name, leaving)


def _save(folder: Path, groups: Mapping[str, Group]) -> None:
    values = {
        name: {
            "threshold": group.threshold,
            "keys": {keyid: key.to_dict() for keyid, key in group.keys.items()},
        }
        for name, group in groups.items()
    }
    write_json(folder / GROUPS, {"format": FORMAT, "groups": values})


def describe(folder: Path) -> Mapping[str, object]:
    """Return a folder of keys as JSON: ids, thresholds, whose private keys lie there."""
    ring = KeyRing.load(folder)
    roles: dict[str, tuple[int, list[str]]] = {
        role: (ring.root.roles[role].threshold, list(ring.root.roles[role].keyids))
        for role in ROLES
    }
    groups = {g.name: (g.threshold, list(g.keys)) for g in load_groups(folder).values()}
    return {
        "folder": str(folder),
        "root_version": ring.root.version,
        "root_expires": ring.root.expires.isoformat(),
        "roles": {name: _keys_of(folder, name, *role) for name, role in roles.items()},
        "groups": {name: _keys_of(folder, name, *group) for name, group in groups.items()},
    }


def _keys_of(folder: Path, name: str, threshold: int, keyids: list[str]) -> dict[str, object]:
    here = {keyid[:16]: key_path(folder, name, keyid).is_file() for keyid in keyids}
    return {"threshold": threshold, "keys": here}
