"""The noun `Fleet`: the robots of robots.toml, each with what it takes to reach and update it.

Written by hand, so it is read strictly: a key that is not known is refused by its name.
"""

import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tomllib

from jetson.install.release import GROUP_NAME
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import Node, read_bounded

Health = Literal["proven", "checked"]
_REMEDY = "see Fleets in the manual (docs/fleet.md)"
_MOST_BYTES = 16 << 20
# Words of ssh's command line: none is taken for an option, none for two.
_HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9._:\[\]%-]{0,252}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_TOP = ("repository", "known_hosts", "ssh_config", "defaults", "groups", "robots")


@dataclass(frozen=True)
class RobotSettings:
    """How a robot is reached and updated; None leaves it to ssh, or to the robot."""

    host: str | None = None
    port: int | None = None
    user: str | None = None
    # File of a private key.
    key: Path | None = None
    # What runs `qvla` there: "qvla", "sudo -n /opt/qvla/qvla-jp7.pex".
    command: tuple[str, ...] = ("qvla",)
    # Paths on the robot: its store, and the root of keys that it trusts, needed once.
    store: str | None = None
    root: str | None = None
    # What its bundles are for: orin-jp7, cpu ...; needed once.
    target: str | None = None
    # Name or start of the digest; None for the newest that is meant for it.
    release: str | None = None
    # Unit of systemd to restart when another release serves.
    restart_unit: str | None = None
    # What it must say of the release: proven by a client's measurement, or only self-checked.
    healthy: Health = "proven"
    # Until it must have said so after the switch, and until the command must have ended.
    proven_within_s: float = 300.0
    within_s: float = 7200.0


@dataclass(frozen=True)
class FleetRobot:
    """A robot of the fleet."""

    name: str
    group: str | None
    settings: RobotSettings

    @property
    def host(self) -> str:
        """Name or address; the robot's own name where none is given."""
        return self.settings.host or self.name


@dataclass(frozen=True)
class Fleet:
    """All robots, in the order of the file, and the files that all share."""

    robots: tuple[FleetRobot, ...]
    # Folder of the signed repository.
    repository: Path
    # Host keys, and configuration, of ssh; None for ssh's own.
    known_hosts: Path | None = None
    ssh_config: Path | None = None

    @staticmethod
    def load(path: Path, repository: Path | None = None) -> "Fleet":
        """Read robots.toml.

        Args:
            path: the file; relative paths in it begin at its folder.
            repository: folder of the repository; None for the one that the file names.

        Raises:
            ArtifactError: it is not a fleet, with the place and the rule.
        """
        top = Node(_parsed(path), path.name, remedy=_REMEDY)
        _require_known(top, _TOP)
        files = {
            name: _path(top.field(name), path.parent)
            for name in ("repository", "known_hosts", "ssh_config")
            if top.has(name)
        }
        place = repository or files.get("repository")
        if place is None:
            raise top.wrong("`repository` (a folder), or --repository, is needed")
        defaults = RobotSettings()
        if top.has("defaults"):
            defaults = _settings(top.field("defaults"), path.parent, defaults, ())
        robots = _robots(top, path.parent, defaults)
        return Fleet(robots, place, files.get("known_hosts"), files.get("ssh_config"))


def _parsed(path: Path) -> Any:
    data = read_bounded(path, "file of robots", _MOST_BYTES)
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is not TOML: {str(error)[:200]}; {_REMEDY}") from None


def _robots(top: Node, folder: Path, defaults: RobotSettings) -> tuple[FleetRobot, ...]:
    groups = top.field("groups").fields() if top.has("groups") else {}
    by_group = {
        _name(name, node): _settings(node, folder, defaults, ()) for name, node in groups.items()
    }
    robots = []
    for name, node in top.field("robots").fields().items():
        group = node.field("group").text() if node.has("group") else None
        if group is not None and group not in by_group:
            raise node.field("group").wrong(f"one of [groups] is needed: {sorted(by_group)}")
        if name in by_group:
            raise node.wrong(f"a robot and a group cannot both be called {name!r}")
        base = defaults if group is None else by_group[group]
        settings = _settings(node, folder, base, ("group",))
        robots.append(FleetRobot(_name(name, node), group, settings))
    if not robots:
        raise top.field("robots").wrong("at least one robot is needed")
    _require_different(top, robots)
    return tuple(robots)


def _settings(
    node: Node, folder: Path, base: RobotSettings, others: tuple[str, ...]
) -> RobotSettings:
    known = [field.name for field in fields(RobotSettings)]
    _require_known(node, (*known, *others))
    changes: dict[str, Any] = {}
    for name, value in node.fields().items():
        if name in known:
            changes[name] = _setting(name, value, folder)
    return replace(base, **changes)


def _setting(name: str, node: Node, folder: Path) -> object:
    if name == "port":
        return node.whole(1, 65535)
    if name in ("proven_within_s", "within_s"):
        return node.positive()
    text = node.text(4096)
    if name in ("host", "user") and not (_HOST if name == "host" else _USER).fullmatch(text):
        raise node.wrong(f"a {'name or address' if name == 'host' else 'name'} is needed")
    if name == "healthy" and text not in get_args(Health):
        raise node.wrong(f"one of {get_args(Health)} is needed")
    if name == "key":
        return _path(node, folder)
    if name == "command":
        return _words(node, text)
    if not text or text.startswith("-") or "\0" in text or "\n" in text:
        raise node.wrong("a text that does not begin with a dash is needed")
    return text


def _words(node: Node, text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError:
        words = ()
    if not words:
        raise node.wrong("the words of a command are needed")
    return words


def _path(node: Node, folder: Path) -> Path:
    text = node.text(4096)
    path = folder.absolute() / Path(text).expanduser()
    if not text or '"' in text or not path.exists():
        raise node.wrong("a path that exists is needed")
    return path


def _name(name: str, node: Node) -> str:
    if GROUP_NAME.fullmatch(name) is None:
        raise node.wrong(f"a name must match {GROUP_NAME.pattern}, {name!r:.80} does not")
    return name


def _require_known(node: Node, known: tuple[str, ...]) -> None:
    surplus = sorted(set(node.fields()) - set(known))
    if surplus:
        raise ArtifactError(
            f"{node.place}: unknown key {surplus[0]!r:.80}; known are {', '.join(sorted(known))}"
        )


def _require_different(top: Node, robots: list[FleetRobot]) -> None:
    places: dict[object, str] = {}
    for robot in robots:
        settings = robot.settings
        place = (robot.host, settings.port, settings.user, settings.store)
        if place in places:
            raise ArtifactError(
                f"{top.place}: robots {places[place]!r} and {robot.name!r} have the same host, "
                f"port, user and store; {_REMEDY}"
            )
        places[place] = robot.name
