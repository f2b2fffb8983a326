"""`qvla release`: make, sign, publish and look at releases."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import BundleArgument, Existing, JsonOption
from qvla_export.cli.progress import print_json, progress_shown
from qvla_export.cli.release.key_ring import SOME_KEYS

A_RELEASE = Existing("release folder", "make it first with: qvla release create")
A_ROOT = Existing("root of keys", "it lies in the folder of keys: 1.root.json")
A_PLACE = Existing("release folder or repository", "check the path", urls=True)

ReleaseArgument = Annotated[
    Path, typer.Argument(help="Release folder.", callback=A_RELEASE.require)
]
RepositoryArgument = Annotated[
    Path, typer.Argument(help="Folder of the repository; the first release makes it.")
]
KeysOption = Annotated[
    Path, typer.Option("--keys", help="Folder of keys.", callback=SOME_KEYS.require)
]
GroupOption = Annotated[str, typer.Option("--group", help="Whose list; default: everyone's.")]


def create(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", help="New release folder.")],
    name: Annotated[str, typer.Option(help="What people call it: pick-w4.")],
    minimum_runtime: Annotated[
        str, typer.Option(help="Oldest version of qvla that may install it.")
    ] = "0.1.0",
    max_drift: Annotated[
        float | None,
        typer.Option(help="Largest normalized difference from the golden actions on the robot."),
    ] = None,
    max_p95_ms: Annotated[
        float | None, typer.Option(help="Longest of 95 in 100 actions on the robot, ms.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a release of a bundle: what it is for, what it must keep, every file by its digest."""
    from jetson.install.release import ReleaseLimits
    from qvla_export.pipeline.release.create import create as create_release

    limits = ReleaseLimits(max_drift, max_p95_ms)
    release = create_release(bundle, output, name, minimum_runtime, limits)
    if as_json:
        print_json({"digest": release.digest, **asdict(release)})
        return
    typer.echo(
        f"release {release.name} {release.digest[:16]} for {release.target}: "
        f"{len(release.files)} files, {release.nbytes / 1e6:.2f} MB -> {output}"
    )


def sign(
    release: ReleaseArgument,
    repository: RepositoryArgument,
    keys: KeysOption,
    days: Annotated[float, typer.Option(min=1, help="Until the list of files expires.")] = 365,
    deltas_from: Annotated[
        int, typer.Option(min=0, help="Newest releases of its target that get patches to it.")
    ] = 1,
    group: GroupOption = "",
    as_json: JsonOption = False,
) -> None:
    """Vouch for a release with the keys that lie here; nothing is shown to robots yet."""
    from qvla_export.pipeline.release.repository import Repository
    from qvla_export.pipeline.release.sign import SignRequest
    from qvla_export.pipeline.release.sign import sign as sign_release

    request = SignRequest(days, deltas_from, group)
    with progress_shown() as on_progress:
        signed = sign_release(release, Repository(repository), keys, request, on_progress)
    if as_json:
        print_json(asdict(signed))
        return
    for delta in signed.deltas:
        share = delta.nbytes / delta.whole_bytes
        typer.echo(f"patch of {delta.file}: {delta.nbytes / 1e6:.3f} MB, {share:.1%} of the file")
    typer.echo(
        f"signed: {signed.name} as list {signed.version}, "
        f"{signed.signatures} of {signed.threshold} signatures"
    )


def publish(
    repository: RepositoryArgument,
    keys: KeysOption,
    release: Annotated[
        Path | None,
        typer.Option(
            "--release",
            help="Signed release folder; without it, say again what is newest.",
            callback=A_RELEASE.require,
        ),
    ] = None,
    days: Annotated[
        float,
        typer.Option(min=1, help="Until robots take it that something newer is held back."),
    ] = 30,
    group: GroupOption = "",
    as_json: JsonOption = False,
) -> None:
    """Copy a signed release into a repository and say, signed, that it is the newest."""
    from qvla_export.pipeline.release.publish import PublishRequest
    from qvla_export.pipeline.release.publish import publish as publish_release
    from qvla_export.pipeline.release.repository import Repository

    request = PublishRequest(release, group, days)
    with progress_shown() as on_progress:
        published = publish_release(Repository(repository), keys, request, on_progress)
    if as_json:
        print_json(asdict(published))
        return
    typer.echo(
        f"published: {published.release or 'nothing new'}, list {published.targets_version}, "
        f"until {published.expires}; {published.written_bytes / 1e6:.2f} MB written, "
        f"{published.present_bytes / 1e6:.2f} MB were there"
    )


def verify(
    repository: Annotated[
        str,
        typer.Argument(help="Folder or URL of a repository.", callback=A_PLACE.require),
    ],
    root: Annotated[
        Path, typer.Option("--root", help="Root that robots trust.", callback=A_ROOT.require)
    ],
    as_json: JsonOption = False,
) -> None:
    """Read a whole repository as a robot would that trusts a root; exit 2 if it must refuse it."""
    from qvla_export.pipeline.release.inspection import verify_repository

    with progress_shown() as on_progress:
        verified = verify_repository(repository, root, on_progress)
    if as_json:
        print_json(asdict(verified))
        return
    typer.echo(
        f"verified: list {verified.targets_version} until {verified.expires}, {verified.files} "
        f"files, {verified.nbytes / 1e6:.2f} MB"
    )
    for release in verified.releases:
        typer.echo(f"  {release.name} {release.digest[:16]} for {release.target}")


def inspect(
    place: Annotated[
        Path,
        typer.Argument(help="Release folder or folder of a repository.", callback=A_PLACE.require),
    ],
) -> None:
    """Print what a release or a repository says it holds, unverified, as JSON."""
    from qvla_export.pipeline.release.inspection import describe

    print_json(describe(place))


def diff(
    before: ReleaseArgument,
    after: Annotated[
        Path, typer.Argument(help="The newer release folder.", callback=A_RELEASE.require)
    ],
) -> None:
    """Print what differs between two releases and what the second costs a robot, as JSON."""
    from qvla_export.pipeline.release.inspection import diff as compare_releases

    print_json(compare_releases(before, after).to_json())
