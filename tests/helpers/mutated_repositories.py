"""Repositories that somebody changed: bytes, fields, whole files, files of an earlier time."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetson.install.release_source import NoSuchFile

Files = Mapping[str, bytes]
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 99, 2**63, 1.5, "", "x", [], {}, [[]], "1" * 5000),
    *("2099-01-01T00:00:00Z", "1970-01-01T00:00:00Z", "0" * 64, "root", "targets.json"),
)


@dataclass
class MemorySource:
    """A repository in memory."""

    files: Files
    place: str = "memory"
    # Bytes that were handed out.
    sent: int = field(default=0, init=False)

    def stream(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes in two pieces."""
        try:
            data = self.files[name][offset:]
        except KeyError:
            raise NoSuchFile(name) from None
        middle = len(data) // 2
        for piece in (data[:middle], data[middle:]):
            self.sent += len(piece)
            yield piece


def read_files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def mutated(now: Files, before: Files, rng: random.Random) -> tuple[str, dict[str, bytes]]:
    """Return what was changed, and the repository with it.

    Args:
        now: the repository as it is.
        before: as it was earlier: what is replayed.
        rng: chooses.
    """
    files = dict(now)
    told = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Mostly what is new, which a robot reads, and metadata more often than its share of files.
        new = [name for name in sorted(files) if before.get(name) != files[name]] or sorted(files)
        metadata = [name for name in new if name.startswith("metadata/")]
        pools = (metadata or new, new, sorted(files))
        name = rng.choice(rng.choices(pools, (0.6, 0.35, 0.05))[0])
        change = rng.choice(_CHANGES)
        change(files, before, name, rng)
        told.append(f"{change.__name__} {name}")
    return ", ".join(told), files


def _flip(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    data = bytearray(files[name])
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def _cut(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    files[name] = files[name][: rng.randrange(len(files[name]) + 1)]


def _lengthen(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    files[name] += rng.choice((b" ", b"\0" * 9000, b"}", files[name]))


def _splice(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    data, other = files[name], files[rng.choice(sorted(files))]
    at = rng.randrange(len(data) + 1)
    files[name] = data[:at] + other[at:]


def _remove(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    if len(files) > 1:
        del files[name]


def _exchange(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    other = rng.choice(sorted(files))
    files[name], files[other] = files[other], files[name]


def _replay(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    files[name] = before[name if name in before else rng.choice(sorted(before))]


def _rename(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    # A file under the name of the version after or before it.
    folder, _, last = name.rpartition("/")
    number, _, rest = last.partition(".")
    if number.isdigit():
        files[f"{folder}/{max(1, int(number) + rng.choice((-1, 1)))}.{rest}"] = files[name]


def _edit(files: dict[str, bytes], before: Files, name: str, rng: random.Random) -> None:
    try:
        document = json.loads(files[name])
    except ValueError:
        return _flip(files, before, name, rng)
    places = list(_places(document))
    if places:
        holder, key = rng.choice(places)
        way = rng.random()
        if way < 0.2 and isinstance(holder, dict):
            del holder[key]
        elif way < 0.4:
            holder[key] = _nudged(holder[key], rng)
        else:
            holder[key] = rng.choice(_VALUES)
    files[name] = json.dumps(document).encode()
    return None


def _nudged(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int):
        return value + rng.choice((-1, 1))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0123456789abcdef") + value[at + 1 :]
    if isinstance(value, list):
        return value * 2
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


_CHANGES: tuple[Callable[[dict[str, bytes], Files, str, random.Random], None], ...] = (
    *(_edit, _edit, _edit, _flip, _cut, _lengthen, _splice),
    *(_remove, _exchange, _replay, _replay, _rename),
)
