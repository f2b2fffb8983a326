"""Which engines this machine has built itself: statements sealed with a key that stays here.

To load an engine is to run its native code, and a digest beside it proves nothing about where both
came from. So every user has a random key in a file only they can read, made at the first build;
what a build states about its engine carries an HMAC with that key. An engine copied from elsewhere,
its statement included, is refused: it may be for another device, and it may be anything.

The seal protects from files that others bring, not from someone who acts as the same user.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.base import EngineError
from qvla_export.shared.artifacts import read_json, write_json

_KEY_BYTES = 32
SEAL = "seal"


class UnsealedEngine(EngineError):
    """A file was not made by this user on this machine, or was changed since."""


def key_path() -> Path:
    """Return where the key is: below $XDG_STATE_HOME, else ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return base / "qvla" / "engine.key"


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON statement with the seal of this machine, making the key if there is none."""
    key = _key(make=True)
    assert key is not None
    write_json(path, {**value, SEAL: _seal(value, key)})


def read_sealed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Read a statement that this machine made.

    Args:
        path: the JSON file.
        what: names it in the error.
        remedy: what to do if it is refused.

    Raises:
        ArtifactError: it is missing or is not JSON.
        UnsealedEngine: it has no seal, or not that of this user and machine.
    """
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UnsealedEngine(f"{what} {path} must be an object with a seal; {remedy}")
    stated = value.pop(SEAL, None)
    key = _key(make=False)
    if key is None or not isinstance(stated, str) or not _agrees(stated, value, key):
        raise UnsealedEngine(
            f"{what} {path} was not made by this user on this machine, or was changed since; "
            f"{remedy}"
        )
    return value


def _agrees(stated: str, value: Mapping[str, Any], key: bytes) -> bool:
    try:
        expected = _seal(value, key)
    except ValueError:  # NaN, which no statement of ours holds
        return False
    return hmac.compare_digest(stated.encode(errors="replace"), expected.encode())


def _seal(value: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes | None:
    path = key_path()
    if make:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Another process may make it at the same moment: the first one stays.
        with contextlib.suppress(FileExistsError):
            _make_key(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _bad_key(path, str(error)) from error
    with os.fdopen(handle, "rb") as file:
        state = os.fstat(file.fileno())
        if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o077:
            raise _bad_key(path, f"owner {state.st_uid}, mode {stat.S_IMODE(state.st_mode):o}")
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise _bad_key(path, f"{len(key)} bytes")
    return key


def _make_key(path: Path) -> None:
    """Put a whole key at `path` or nothing: under a temporary name first, then a link."""
    if path.exists():
        raise FileExistsError(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _bad_key(path: Path, why: str) -> EngineError:
    return EngineError(
        f"{path} must be a file of {_KEY_BYTES} bytes that only you can read, it is not ({why}); "
        "delete it and build the engines again"
    )
