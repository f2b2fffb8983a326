"""Which format a recording is of, known by its files' names."""

from pathlib import Path

# What shows a format, and how it is called; the first that matches.
_READ = (
    (("*.tfrecord*", "*/*.tfrecord*", "dataset_info.json", "*/dataset_info.json"), "RLDS"),
    (("episode_*.npz", "ep_start_end_ids.npy"), "CALVIN"),
    (("*.hdf5", "*.h5"), "HDF5"),
    (("frames.jsonl", "frames.json", "*calib*.jsonl"), "list of pictures"),
    (("*.mcap",), "MCAP"),
)
# Of formats that are known by name only.
_OTHERS = (
    ("*.bag", "a ROS 1 bag"),
    ("*.db3", "a ROS 2 bag"),
    ("*.zarr", "a Zarr store"),
    (".zgroup", "a Zarr store"),
    ("*.pkl", "a pickle"),
    ("*.pickle", "a pickle"),
    ("*.arrow", "Arrow files of the datasets library"),
    ("*.array_record*", "RLDS in array_record files"),
    ("*/*.array_record*", "RLDS in array_record files"),
    ("*.tar", "a WebDataset"),
    *((f"*{ending}", "an archive (unpack it)") for ending in (".zip", ".gz", ".tgz", ".zst")),
    ("*.lmdb", "an LMDB"),
)
# Below a folder that was given: organisation and name, or name and version.
_BELOW = ("*/", "*/*/")
_SHOWN = ("episode_*.npz", "*.hdf5", "*.h5", "*.mcap", "*.tfrecord*")
_FORMATS = (
    "LeRobotDataset, RLDS (TFRecord), LIBERO and ALOHA HDF5, CALVIN npz, lists of pictures "
    "(calib.jsonl, frames.json) and MCAP recordings of qvla"
)


def known_format(root: Path) -> str | None:
    """Return the name of the format, other than LeRobot's, that is read here; None for others."""
    names = (name for patterns, name in _READ if any(_matches(root, p) for p in patterns))
    # The datasets library writes a dataset_info.json too.
    return None if _matches(root, "*.arrow") else next(names, None)


def describe_other(root: Path) -> str | None:
    """Return what a place is that holds no recording, and the remedy; None if unknown."""
    if not root.exists():
        return f"data set not found: {root}"
    if root.is_dir():
        inner = [
            path.parents[1] for below in _BELOW for path in root.glob(below + "meta/info.json")
        ]
        for pattern in _SHOWN:
            inner += [path.parent for below in _BELOW for path in root.glob(below + pattern)]
        if inner:
            return f"{root} holds datasets and is none; give one of them, {inner[0]}"
    for pattern, name in _OTHERS:
        if _matches(root, pattern):
            return f"{root} is {name}, which is not read; these are: {_FORMATS}"
    above = next((path for path in root.resolve().parents if _is_lerobot(path)), None)
    if above is not None:
        return f"{root} is a part of the LeRobotDataset {above}; give that folder"
    # An interrupted download of LeRobot's has its folder of metadata.
    whole = root.is_file() or not (root / "meta").exists()
    return f"{root} is no recording that is read; these are: {_FORMATS}" if whole else None


def _is_lerobot(folder: Path) -> bool:
    return (folder / "meta/info.json").is_file()


def _matches(root: Path, pattern: str) -> bool:
    if root.is_file():
        return root.match(pattern)
    return next(root.glob(pattern), None) is not None
