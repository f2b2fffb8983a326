"""Why a repository is refused, by name, from what python-tuf found and from the file it read."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    UnsignedMetadataError,
)

from jetson.install.release import Reason, RefusedRelease
from qvla_export.shared.json_documents import object_or_empty

_HOLD = "Do not install from it; nothing was changed here"


@dataclass(frozen=True)
class RoleKeys:
    """Which keys of a role, or a group, sign now, and which did at any time before."""

    now: Mapping[str, Set[str]] = field(default_factory=dict)
    ever: Mapping[str, Set[str]] = field(default_factory=dict)
    # How many must sign.
    thresholds: Mapping[str, int] = field(default_factory=dict)


def refusal(error: Exception, name: str, data: bytes, keys: RoleKeys) -> RefusedRelease:
    """Return the refusal that an error of python-tuf stands for.

    Args:
        error: what it raised.
        name: file of the repository that was read last, "metadata/3.targets.json".
        data: its bytes, as far as they came.
        keys: those that this robot has seen.
    """
    stem = name.rpartition("/")[2].removesuffix(".json")
    version, _, role = stem.rpartition(".")
    if isinstance(error, ExpiredMetadataError):
        return RefusedRelease(
            "frozen",
            f"what the repository vouches for has expired ({error}): somebody holds newer releases "
            "back, or nobody has published for long (qvla release publish), or this machine's "
            "clock is wrong",
        )
    if isinstance(error, BadVersionNumberError):
        if _version_of(data) != version and version:
            return _refused("mixed", f"{name} is of version {_version_of(data)}: {error}")
        return _refused("rolled back", f"{name} is older than what this robot has seen: {error}")
    if isinstance(error, DownloadLengthMismatchError):
        return _refused("endless", f"{name} is longer than it may be: {error}")
    if isinstance(error, DownloadHTTPError):
        return _refused("missing file", f"the repository has no {name}")
    if isinstance(error, UnsignedMetadataError):
        return _unsigned(error, name, role or stem, data, keys)
    if _is_cut(data):
        return _refused("truncated", f"{name} ends in the middle")
    return _refused("altered", f"{name} is not what its keys signed: {str(error)[:300]}")


def _unsigned(
    error: Exception, name: str, role: str, data: bytes, keys: RoleKeys
) -> RefusedRelease:
    signers = _signers(data)
    entitled = signers & keys.now.get(role, frozenset())
    if entitled and len(entitled) >= keys.thresholds.get(role, 1):
        return _refused("altered", f"{name} is not what its keys signed: {error}")
    if gone := signers & (keys.ever.get(role, frozenset()) - entitled):
        return _refused(
            "revoked key",
            f"{name} is signed by {sorted(gone)[0][:12]}, whose right to sign {role} was taken "
            "back; sign and publish with a current key",
        )
    return _refused(
        "unsigned", f"{name} has too few signatures of keys that may sign {role}: {error}"
    )


def _refused(reason: Reason, message: str) -> RefusedRelease:
    return RefusedRelease(reason, f"{message}. {_HOLD}")


def _version_of(data: bytes) -> str:
    signed = object_or_empty(data).get("signed")
    return str(signed.get("version")) if isinstance(signed, dict) else ""


def _signers(data: bytes) -> set[str]:
    signatures = object_or_empty(data).get("signatures")
    if not isinstance(signatures, list):
        return set()
    return {str(one.get("keyid")) for one in signatures if isinstance(one, dict) and one.get("sig")}


def _is_cut(data: bytes) -> bool:
    """Return whether a JSON text is the beginning of one."""
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        rest = data.decode(errors="replace")[error.pos :]
        return not rest.strip() or error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False
    return False
