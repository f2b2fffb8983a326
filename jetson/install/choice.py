"""Choose the release that a robot is to have, among those that are meant for it."""

from collections.abc import Sequence

from jetson.install.release import RefusedRelease
from jetson.install.trust import Catalogue, VouchedFile


def choose(catalogue: Catalogue, target: str, release: str | None = None) -> VouchedFile:
    """Return the release that a robot is to have.

    Args:
        catalogue: what the repository offers.
        target: of the robot.
        release: name or start of the digest; None for the newest of the target, in the closest list
            that has one.

    Raises:
        RefusedRelease: "unknown release", or "wrong target".
    """
    closest = (*catalogue.lists, "")
    offers = sorted(catalogue.releases(), key=lambda t: (closest.index(t.group), -_serial(t)))
    if release is not None:
        offers = [t for t in offers if release == t.custom.get("name") or _begins(t, release)]
    fitting = [t for t in offers if t.custom.get("target") == target]
    if fitting:
        return fitting[0]
    if offers:
        raise wrong_target(
            str(offers[0].custom.get("name")), str(offers[0].custom.get("target")), target
        )
    what = "no release" if release is None else f"no release called {release!r:.80}"
    raise RefusedRelease("unknown release", f"the repository has {what}; see qvla release inspect")


def _serial(vouched: VouchedFile) -> int:
    serial = vouched.custom.get("serial")
    return serial if type(serial) is int else 0


def _begins(vouched: VouchedFile, digest: str) -> bool:
    return len(digest) >= 6 and vouched.name.rpartition("/")[2].startswith(digest)


def require_nobodys(everything: Catalogue, release: str, groups: Sequence[str]) -> None:
    """Refuse a release that is meant for other robots."""
    for one in everything.releases():
        if one.group and (release == one.custom.get("name") or _begins(one, release)):
            mine = f"of {', '.join(groups)}" if groups else "of no group"
            raise RefusedRelease(
                "not for this robot",
                f"release {release!r:.80} is meant for {one.group}, this robot is {mine}; publish "
                "it for this robot, or tell it where it belongs: --group",
            )


def wrong_target(name: str, its: str, target: str) -> RefusedRelease:
    """Return the refusal of a release for another kind of robot."""
    return RefusedRelease(
        "wrong target",
        f"release {name!r} is for {its}, this robot is a {target}; export and release for it",
    )
