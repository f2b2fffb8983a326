"""Keys of releases: who may sign what, and how a key is replaced or taken back.

    root        says which keys may sign; offline, several people, a threshold of them
    targets     the release engineer's: which releases there are
    snapshot, timestamp   of the machine that publishes: what is newest, and until when

A folder of keys holds a private key a file, `<role>-<key id>.pem`, and every root,
`<version>.root.json`. Public keys and roots are not secret; a private key lies only where its role
is played. Roles are TUF's (specification 1.0.33, section 2.1).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Literal, get_args

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Role, Root

from qvla_export.shared.artifacts import sync_folder, write_bytes
from qvla_export.shared.errors import QvlaError

RoleName = Literal["root", "targets", "snapshot", "timestamp"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)
_RETIRED = "retired"


class KeyRingError(QvlaError):
    """Keys are missing, too few, or not those of a role."""


@dataclass(frozen=True)
class KeyPolicy:
    """How many keys a role has, and how many must sign.

    Raises:
        KeyRingError: a threshold cannot be met.
    """

    root_keys: int = 3
    root_threshold: int = 2
    targets_keys: int = 1
    targets_threshold: int = 1
    # After this, robots trust no root until a new one is signed.
    root_days: int = 365

    def __post_init__(self) -> None:
        for role in ("root", "targets"):
            count, threshold = self.keys(role), self.threshold(role)
            if not 1 <= threshold <= count <= 32:
                raise KeyRingError(
                    f"{role}: a threshold of {threshold} with {count} keys; it must be 1 to the "
                    "number of keys, of which there may be 32"
                )

    def keys(self, role: str) -> int:
        """Return how many keys a role has."""
        return {"root": self.root_keys, "targets": self.targets_keys}.get(role, 1)

    def threshold(self, role: str) -> int:
        """Return how many keys of a role must sign."""
        return {"root": self.root_threshold, "targets": self.targets_threshold}.get(role, 1)


@dataclass(frozen=True)
class KeyRing:
    """A folder of keys."""

    folder: Path
    # Newest last.
    roots: tuple[Metadata[Root], ...] = field(repr=False)

    @property
    def root(self) -> Root:
        """The newest root."""
        return self.roots[-1].signed

    @staticmethod
    def load(folder: Path) -> "KeyRing":
        """Read a folder of keys.

        Raises:
            KeyRingError: it holds no root, or a damaged one.
        """
        numbered = {path.name.split(".")[0]: path for path in folder.glob("*.root.json")}
        paths = [numbered[n] for n in sorted(filter(str.isdecimal, numbered), key=int)]
        if not paths:
            raise KeyRingError(
                f"{folder} holds no keys; make them first with: qvla keys new {folder}"
            )
        try:
            return KeyRing(folder, tuple(Metadata[Root].from_bytes(p.read_bytes()) for p in paths))
        except RepositoryError as error:
            raise KeyRingError(f"{folder} holds a damaged root: {error}") from None

    def signers(self, role: str, root: Root | None = None) -> list[Signer]:
        """Return the signers of a role whose private keys lie here; see `require_signers`."""
        return load_signers(self.folder, role, (root or self.root).roles[role].keyids)

    def require_signers(self, role: str, root: Root | None = None) -> list[Signer]:
        """Return enough signers of a role for its threshold.

        Raises:
            KeyRingError: too few private keys lie here.
        """
        return require_enough(self.folder, role, (root or self.root).roles[role])


def key_path(folder: Path, role: str, keyid: str) -> Path:
    """Return where a private key lies."""
    return folder / f"{role}-{keyid[:16]}.pem"


def load_signers(folder: Path, role: str, keyids: Sequence[str]) -> list[Signer]:
    """Return the signers whose private keys lie in a folder."""
    paths = [key_path(folder, role, keyid) for keyid in keyids]
    return [_load_signer(path) for path in paths if path.is_file()]


def require_enough(folder: Path, name: str, role: Role) -> list[Signer]:
    """Return enough signers of a role for its threshold.

    Raises:
        KeyRingError: too few private keys lie in the folder.
    """
    signers = load_signers(folder, name, role.keyids)
    if len(signers) < role.threshold:
        files = [key_path(folder, name, keyid).name for keyid in role.keyids]
        raise KeyRingError(
            f"{role.threshold} private keys must sign as {name}, {len(signers)} lie in {folder}; "
            f"bring more of {files}"
        )
    return signers


def find_key(roles: Mapping[str, Sequence[str]], key: str) -> tuple[str, str]:
    """Return the role and the whole id of a key by the start of its id.

    Args:
        roles: ids of keys by role.
        key: the start.

    Raises:
        KeyRingError: no key, or several, begin so.
    """
    found = [
        (role, keyid)
        for role, keyids in roles.items()
        for keyid in keyids
        if len(key) >= 6 and keyid.startswith(key)
    ]
    if len(found) != 1:
        known = {role: [keyid[:16] for keyid in keyids] for role, keyids in roles.items()}
        raise KeyRingError(
            f"{key!r:.80} must be the start of one key's id, 6 digits at least: {known}"
        )
    return found[0]


def new_keys(folder: Path, policy: KeyPolicy) -> KeyRing:
    """Make the keys of every role and the first root.

    Raises:
        KeyRingError: the folder holds keys.
    """
    if folder.exists() and any(folder.iterdir()):
        raise KeyRingError(f"{folder} is not empty; keys are never replaced: qvla keys rotate")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    root = Root(version=1, expires=in_days(policy.root_days), consistent_snapshot=True)
    for role in ROLES:
        root.roles[role].threshold = policy.threshold(role)
        for _ in range(policy.keys(role)):
            _add_key(folder, root, role)
    ring = KeyRing(folder, ())
    return _sign_root(ring, root, ring.require_signers("root", root))


def rotate_keys(folder: Path, role: RoleName, days: int = 365) -> KeyRing:
    """Replace every key of a role; robots follow by the new root.

    What the old keys of targets, snapshot and timestamp signed is refused from then on: sign and
    publish again.

    Raises:
        KeyRingError: too few of the root's private keys lie here.
    """
    ring = KeyRing.load(folder)
    return _replace_keys(ring, role, tuple(ring.root.roles[role].keyids), days)


def revoke_key(folder: Path, key: str, days: int = 365) -> KeyRing:
    """Take the right to sign from one key, and give it to a new one.

    Args:
        folder: of the keys; the revoked private key need not be there.
        key: start of the key's id.
        days: until the new root expires.

    Raises:
        KeyRingError: no key, or several, begin so; or too few of the root's private keys lie here.
    """
    ring = KeyRing.load(folder)
    found, keyid = find_key({role: ring.root.roles[role].keyids for role in ROLES}, key)
    (role,) = (role for role in ROLES if role == found)
    return _replace_keys(ring, role, (keyid,), days)


def in_days(days: float) -> datetime:
    """Return the moment so many days from now, in whole seconds, as TUF writes it."""
    return (datetime.now(timezone.utc) + timedelta(days=days)).replace(microsecond=0)


def _replace_keys(ring: KeyRing, role: RoleName, leaving: Sequence[str], days: int) -> KeyRing:
    before = ring.root
    signers = {
        s.public_key.keyid: s for s in ring.signers("root") if s.public_key.keyid not in leaving
    }
    # An old root's keys may sign their own departure, but a revoked key is not asked.
    if role == "root" and set(leaving) == set(before.roles["root"].keyids):
        signers = {s.public_key.keyid: s for s in ring.require_signers("root")}
    if len(signers) < before.roles["root"].threshold:
        ring.require_signers("root")
        raise KeyRingError(
            f"{before.roles['root'].threshold} other root keys must sign, {len(signers)} lie in "
            f"{ring.folder}"
        )
    root = Root.from_dict(before.to_dict())
    root.version, root.expires = before.version + 1, in_days(days)
    for keyid in leaving:
        root.revoke_key(keyid, role)
        _add_key(ring.folder, root, role)
    for signer in ring.signers("root", root):
        signers[signer.public_key.keyid] = signer
    renewed = _sign_root(ring, root, list(signers.values()))
    retire_keys(ring.folder, role, leaving)
    return renewed


def retire_keys(folder: Path, role: str, keyids: Sequence[str]) -> None:
    """Put private keys that sign no more out of the way."""
    for keyid in keyids:
        path = key_path(folder, role, keyid)
        if path.is_file():
            (folder / _RETIRED).mkdir(mode=0o700, exist_ok=True)
            path.rename(folder / _RETIRED / path.name)


def _add_key(folder: Path, root: Root, role: str) -> None:
    root.add_key(new_signer(folder, role).public_key, role)


def new_signer(folder: Path, role: str) -> CryptoSigner:
    """Make a key; its private part lies in the folder before anybody is told of it."""
    signer = CryptoSigner.generate_ed25519()
    path = key_path(folder, role, signer.public_key.keyid)
    # The private key is there, whole and nobody else's, before any root names it.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(signer.private_bytes)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    return signer


def _load_signer(path: Path) -> Signer:
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except (ValueError, TypeError) as error:
        raise KeyRingError(f"{path} is no private key: {error}") from None


def _sign_root(ring: KeyRing, root: Root, signers: Sequence[Signer]) -> KeyRing:
    signed = Metadata(root)
    for signer in signers:
        signed.sign(signer, append=True)
    write_bytes(ring.folder / f"{root.version}.root.json", signed.to_bytes())
    return KeyRing(ring.folder, (*ring.roots, signed))
