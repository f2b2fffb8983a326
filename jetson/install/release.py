"""The noun `Release`: a bundle as robots install it, every file named by its digest.

release.json is what is signed; the digest of its bytes names the release. The robot imports this
module: no torch, no onnx, no signatures either, which are `jetson.install.trust`'s.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qvla_export.shared.artifacts import MANIFEST, sha256_file
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import JsonLimits, parse_document, read_bounded

if TYPE_CHECKING:
    from qvla_export.shared.bundle import Bundle

FORMAT = "qvla-release-1"
RELEASE = "release.json"
BUNDLE = "bundle"
# A release of a 7B policy in many parts has some hundred files.
MOST_RELEASE_BYTES = 4 << 20
_LIMITS = JsonLimits(size_bytes=MOST_RELEASE_BYTES, values=200_000, depth=8)
# Names of files lie in one folder; none leaves it, none is hidden.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Of a list of releases that is meant for some robots only: a group's, or one robot's.
GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\d+(\.\d+){0,3}")
_MOST_FILE_BYTES = 1 << 40

Reason = Literal[
    "unsigned",
    "altered",
    "truncated",
    "endless",
    "rolled back",
    "frozen",
    "mixed",
    "wrong target",
    "future format",
    "revoked key",
    "extra file",
    "missing file",
    "unknown release",
    "unknown group",
    "not for this robot",
    "runtime too old",
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class RefusedRelease(ArtifactError):
    """A release or its repository is refused, for a reason that has a name."""

    def __init__(self, reason: Reason, message: str) -> None:
        """State why.

        Args:
            reason: the refusal's name.
            message: the rule, the value and the remedy.
        """
        super().__init__(f"{reason}: {message}")
        self.reason: Reason = reason


@dataclass(frozen=True)
class ReleaseFile:
    """A file of the bundle."""

    name: str
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class ReleaseLimits:
    """What a robot's engine must keep on the golden observations before it may serve."""

    # Largest normalized |difference| from the golden actions (their range is 2); None: what
    # `engines.thresholds` allows the bundle.
    drift: float | None = None
    # Longest of 95 in 100 actions, milliseconds; None asks for nothing.
    p95_ms: float | None = None


@dataclass(frozen=True)
class Release:
    """A bundle, what it is for and what it must keep."""

    name: str
    target: str
    # Oldest version of `qvla` that may install it.
    minimum_runtime: str
    bundle_digest: str
    policy_digest: str
    # None for a float policy.
    plan_digest: str | None
    limits: ReleaseLimits
    files: tuple[ReleaseFile, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the document, which holds the SHA-256 of every file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the document; equal releases have equal bytes."""
        value = {"format": FORMAT, **asdict(self)}
        return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()

    @staticmethod
    def of_bundle(
        bundle: "Bundle", name: str, minimum_runtime: str, limits: ReleaseLimits
    ) -> "Release":
        """Return the release of a bundle that `Bundle.load` has verified.

        Raises:
            ArtifactError: the name, the version or a limit is not one.
        """
        plan = bundle.plan
        paths = [bundle.path / MANIFEST, *(bundle.path / file for file in bundle.manifest["files"])]
        files = tuple(
            ReleaseFile(path.name, sha256_file(path), path.stat().st_size) for path in sorted(paths)
        )
        release = Release(
            name,
            bundle.target,
            minimum_runtime,
            bundle.digest,
            bundle.policy_digest,
            None if plan is None else str(plan["digest"]),
            limits,
            files,
        )
        return Release.from_bytes(release.to_bytes(), "the new release")

    @staticmethod
    def load(folder: Path) -> "Release":
        """Read the release of a folder that `qvla release create` made.

        Raises:
            ArtifactError: there is none, or it is not one of this version.
        """
        path = folder / RELEASE
        if not path.is_file():
            raise ArtifactError(
                f"release not found: {path}; make it first with: qvla release create"
            )
        return Release.read(path)

    @staticmethod
    def read(path: Path) -> "Release":
        """Read a document that lies in a file.

        Raises:
            ArtifactError: it is missing, or too large.
            RefusedRelease: see `from_bytes`.
        """
        return Release.from_bytes(read_bounded(path, "release", MOST_RELEASE_BYTES), str(path))

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Release":
        """Read a document of unknown origin.

        Raises:
            RefusedRelease: "future format" or "altered".
        """
        try:
            value = parse_document(data, f"{where} is not valid JSON", _LIMITS)
        except ArtifactError as error:
            raise RefusedRelease("altered", str(error)) from None
        found = value.get("format") if isinstance(value, dict) else None
        if found != FORMAT:
            raise _wrong_format(where, found)
        try:
            release = _parse(value)
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedRelease("altered", f"{where} is not a release: {error}") from None
        if release.to_bytes() != data:
            raise RefusedRelease(
                "altered",
                f"{where} is not written as releases are; make it with: qvla release create",
            )
        return release


def _wrong_format(where: str, found: object) -> RefusedRelease:
    stem, _, version = str(found).rpartition("-")
    if f"{stem}-" == FORMAT[: len(stem) + 1] and version.isdigit():
        return RefusedRelease(
            "future format",
            f"{where} is of format {found!r:.60}, this version reads {FORMAT!r}; update qvla first",
        )
    return RefusedRelease("altered", f"{where} must be of format {FORMAT!r}, got {found!r:.60}")


def _parse(value: Mapping[str, Any]) -> Release:
    files = tuple(
        ReleaseFile(
            _matching(file["name"], _FILE_NAME, "a file's name"),
            _matching(file["sha256"], _DIGEST, "a file's digest"),
            _count(file["nbytes"]),
        )
        for file in value["files"]
    )
    names = [file.name for file in files]
    if names != sorted(set(names)) or MANIFEST not in names:
        raise ValueError(f"its files must be sorted, distinct and hold {MANIFEST}")
    plan = value["plan_digest"]
    limits = value["limits"]
    return Release(
        _matching(value["name"], _NAME, "the name"),
        _matching(value["target"], _NAME, "the target"),
        _matching(value["minimum_runtime"], _VERSION, "the minimum runtime"),
        _matching(value["bundle_digest"], _DIGEST, "the bundle's digest"),
        _matching(value["policy_digest"], _DIGEST, "the policy's digest"),
        None if plan is None else _matching(plan, _DIGEST, "the plan's digest"),
        ReleaseLimits(*(_limit(limits[key]) for key in ("drift", "p95_ms"))),
        files,
    )


def _matching(value: object, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise ValueError(f"{what} must match {pattern.pattern}, got {value!r:.80}")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_FILE_BYTES:
        raise ValueError(f"a file's bytes must be in 0 to {_MOST_FILE_BYTES}, got {value!r:.40}")
    return value


def _limit(value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < float(str(value)) < 1e6:
        raise ValueError(f"a limit must be a number above 0 and below 1e6, got {value!r:.40}")
    return float(str(value))


def require_runtime(release: Release, installed: str) -> None:
    """Refuse a release that needs a newer `qvla` than is installed.

    Raises:
        RefusedRelease: "runtime too old".
    """
    if _numbers(installed) < _numbers(release.minimum_runtime):
        raise RefusedRelease(
            "runtime too old",
            f"release {release.name!r} needs qvla {release.minimum_runtime} or newer, {installed} "
            "is installed; update it first",
        )


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(found) for found in re.findall(r"\d+", version)[:4]]
    return (*numbers, *[0] * (4 - len(numbers)))
