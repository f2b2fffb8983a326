"""Formats of recordings that are not read, known by their files and refused by name."""

from pathlib import Path

# What a file's name ends with, what that is, and what to do.
_WRITE = "write its episodes as a LeRobotDataset with images"
_FORMATS = (
    ("*.hdf5", "HDF5, as LIBERO and ALOHA record", _WRITE),
    ("*.h5", "HDF5, as LIBERO and ALOHA record", _WRITE),
    ("episode_*.npz", "CALVIN, one npz file a frame", _WRITE),
    ("*.tfrecord*", "RLDS, TFRecord files of tensorflow-datasets", _WRITE),
    (
        "*calib*.jsonl",
        "calib.jsonl of the official QVLA code",
        "give the dataset it was drawn from",
    ),
    ("dataset_info.json", "RLDS, metadata of tensorflow-datasets", _WRITE),
    ("*.mcap", "MCAP, a recording", "`qvla replay` reads it; " + _WRITE),
)
# Below a folder that was given, as TFRecord files lie in NAME/VERSION.
_DEPTHS = ("", "*/", "*/*/")


def describe_other_format(root: Path) -> str | None:
    """Return what a place without LeRobot's metadata is, and the remedy; None if unknown."""
    if root.is_dir():
        inner = (path for depth in _DEPTHS[1:] for path in root.glob(depth + "meta/info.json"))
        if (dataset := next(inner, None)) is not None:
            return f"{root} holds datasets and is none; give one of them, {dataset.parents[1]}"
    for pattern, name, remedy in _FORMATS:
        places = [root] if root.is_file() else []
        places += [path for depth in _DEPTHS for path in root.glob(depth + pattern)]
        if same := [path for path in places if path.match(pattern)]:
            return f"{same[0]} is {name}, which is not read; {remedy}"
    return None
