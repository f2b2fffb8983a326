"""Which format a recording is of, seen from its files, and the reader for it."""

from collections.abc import Callable
from pathlib import Path

from calibration.sources.base import DataSource
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.other_formats import known_format
from qvla_export.shared.errors import ArtifactError


def open_source(root: Path, keys: KeyMap | None = None) -> DataSource:
    """Open a recording of any format that is read; libraries are imported for its own alone.

    Args:
        root: file or folder.
        keys: which columns are what, and what to do where the recording does not say.

    Raises:
        ArtifactError: it is of no format that is read, or is damaged.
        QvlaError: a column is not there.
    """
    if not root.exists():
        raise ArtifactError(f"no recording found: {root}")
    name = None if (root / "meta").is_dir() else known_format(root)
    if name is not None:
        return _OPENERS[name](root, keys)
    from calibration.sources.lerobot import LeRobotDataset

    return LeRobotDataset(root, keys)


def _open_rlds(root: Path, keys: KeyMap | None) -> DataSource:
    from calibration.sources.rlds.rlds_dataset import RldsDataset

    # Its metadata was named: the data lie beside it.
    return RldsDataset(root.parent if root.suffix == ".json" else root, keys)


def _open_hdf5(root: Path, keys: KeyMap | None) -> DataSource:
    from calibration.sources.hdf5.aloha_hdf5 import AlohaHdf5
    from calibration.sources.hdf5.hdf5_episodes import hdf5_files
    from calibration.sources.hdf5.hdf5_file import Hdf5File
    from calibration.sources.hdf5.libero_hdf5 import LiberoHdf5

    path = hdf5_files(root)[0]
    file = Hdf5File(path)
    try:
        groups = file.members("")
    finally:
        file.close()
    if "data" in groups:
        return LiberoHdf5(root, keys)
    if "observations" in groups:
        return AlohaHdf5(root, keys)
    raise ArtifactError(
        f"{path} is HDF5, but neither LIBERO's, with data/demo_<k>, nor ALOHA's, with "
        f"observations/images; it has {', '.join(groups) or 'nothing'}"
    )


def _open_calvin(root: Path, keys: KeyMap | None) -> DataSource:
    from calibration.sources.calvin_npz import CalvinNpz

    return CalvinNpz(root.parent if root.is_file() else root, keys)


def _open_list(root: Path, keys: KeyMap | None) -> DataSource:
    from calibration.sources.picture_lists import PictureList

    return PictureList(root, keys)


def _open_mcap(root: Path, keys: KeyMap | None) -> DataSource:
    from calibration.sources.mcap_recordings import McapRecordings

    return McapRecordings(root, keys)


_OPENERS: dict[str, Callable[[Path, KeyMap | None], DataSource]] = {
    "RLDS": _open_rlds,
    "CALVIN": _open_calvin,
    "HDF5": _open_hdf5,
    "list of pictures": _open_list,
    "MCAP": _open_mcap,
}
