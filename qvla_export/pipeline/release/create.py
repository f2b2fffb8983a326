"""The step that makes a release of a bundle: a folder to sign and publish."""

import shutil
from pathlib import Path

from jetson.install.release import BUNDLE, RELEASE, Release, ReleaseLimits
from qvla_export.shared.artifacts import new_folder, write_bytes
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError


def create(
    bundle: Path, folder: Path, name: str, minimum_runtime: str, limits: ReleaseLimits
) -> Release:
    """Make a release folder: release.json and the bundle's files.

    Raises:
        ArtifactError: the bundle is damaged, or a release of another kind lies there.
    """
    release = Release.of_bundle(Bundle.load(bundle), name, minimum_runtime, limits)
    if folder.exists():
        if (folder / RELEASE).is_file() and Release.load(folder) == release:
            return release
        raise ArtifactError(
            f"{folder} holds something else; a release is never replaced: name another folder"
        )
    with new_folder(folder) as temporary:
        (temporary / BUNDLE).mkdir()
        for file in release.files:
            shutil.copyfile(bundle / file.name, temporary / BUNDLE / file.name)
        write_bytes(temporary / RELEASE, release.to_bytes())
    return release
