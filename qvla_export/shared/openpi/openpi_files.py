"""What a checkpoint of openpi's PyTorch layout says of its policy: config.json, norm_stats.json.

config.json (openpi `examples/convert_jax_model_to_pytorch.py`) has widths and variants, the
statistics lie in `assets/<asset>/norm_stats.json`. Cameras, prompt and number of steps are in the
code of openpi's training configurations alone: their usual values hold, `qvla_policy.json` says
otherwise.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qvla_export.shared.errors import StatisticsError
from qvla_export.shared.git_lfs import refuse_pointer
from qvla_export.shared.json_documents import FOREIGN, Node, read_json
from qvla_export.shared.normalization import Affine, Statistics, require_limits

CONFIG = "config.json"
# The three images of every published policy, in this order.
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
_STATISTICS = "norm_stats.json"
# A weight that pi0.5 has and pi0 has not.
_ADAPTIVE = "time_mlp_in.weight"
_EPSILON = 1e-6  # openpi `transforms.Normalize`
_REMEDY = "copy assets/ of the checkpoint that was converted, or compute the statistics again"


@dataclass(frozen=True)
class OpenPiConfig:
    """What config.json says."""

    # Numbers of an action in the network, and actions of a chunk.
    action_width: int
    horizon: int


def is_openpi(checkpoint: Path) -> bool:
    """Whether a folder's config.json is of a policy that openpi converted.

    Raises:
        ArtifactError: it is not JSON.
    """
    if not (checkpoint / CONFIG).is_file():
        return False
    raw = read_json(checkpoint / CONFIG, "model configuration", FOREIGN)
    fields = {"action_dim", "action_horizon", "paligemma_variant"}
    return isinstance(raw, dict) and fields <= set(raw) and not {"type", "model_type"} & set(raw)


def read_openpi_config(checkpoint: Path) -> OpenPiConfig:
    """Read config.json.

    Raises:
        ArtifactError: a field is missing or malformed.
    """
    path = checkpoint / CONFIG
    node = Node(read_json(path, "model configuration", FOREIGN), str(path))
    return OpenPiConfig(
        node.field("action_dim").whole(1, 4096), node.field("action_horizon").whole(1, 4096)
    )


def uses_quantiles(checkpoint: Path) -> bool:
    """Whether quantiles normalize, as pi0.5's do: the weights' names say which policy it is.

    Raises:
        StatisticsError: the weights are missing or damaged.
    """
    index, single = (checkpoint / f"model.safetensors{end}" for end in (".index.json", ""))
    try:
        if index.is_file():
            names = [
                *Node(read_json(index, "shard index"), str(index)).field("weight_map").fields()
            ]
        else:
            with safe_open(single, framework="np") as file:
                names = [*file.keys()]
    except (SafetensorError, OSError) as error:
        refuse_pointer(single)
        raise StatisticsError(f"{single} does not say which policy it is: {error}") from error
    return _ADAPTIVE in names


def openpi_sizes(checkpoint: Path, key: str | None = None) -> tuple[int, int]:
    """Return the robot's numbers of an action and of a state, as the statistics have them.

    Raises:
        StatisticsError: as `openpi_statistics`.
    """
    _, table = _read_table(checkpoint, key)
    return len(table["actions"]["mean"]), len(table["state"]["mean"])


def openpi_statistics(
    checkpoint: Path, key: str | None, quantiles: bool, sizes: tuple[int, int]
) -> Statistics:
    """Return what normalizes a policy's state and un-normalizes its actions; nothing is clipped.

    Args:
        checkpoint: its folder.
        key: name of the asset; None for the only one.
        quantiles: pi0.5's 1 % and 99 % quantiles are -1 and 1; else mean and standard deviation.
        sizes: numbers of an action and of a state; statistics of more are cut, as openpi does.

    Raises:
        StatisticsError: they are missing, too short, not finite, or the key is missing or
            ambiguous.
    """
    path, table = _read_table(checkpoint, key)
    found = []
    for part, size in zip(("actions", "state"), sizes, strict=True):
        where = f"{path}: {part!r}"
        if (length := len(table[part]["mean"])) < size:
            raise StatisticsError(
                f"{where} has {length} numbers, the policy's have {size}; correct "
                "action_dim or state_dim of qvla_policy.json, or name another preset"
            )
        cut = {name: values[:size] for name, values in table[part].items()}
        found.append(_affine(cut, quantiles, where))
    return Statistics(path.parent.relative_to(checkpoint / "assets").as_posix(), *found)


def _affine(table: Mapping[str, NDArray[np.float64]], quantiles: bool, where: str) -> Affine:
    needed = ("q01", "q99") if quantiles else ("mean", "std")
    if missing := [name for name in needed if name not in table]:
        raise StatisticsError(
            f"{where} lacks {missing}; it has {sorted(table)}: pi0.5 needs q01 and q99, pi0 mean "
            f"and std; {_REMEDY}"
        )
    first, second = (table[name] for name in needed)
    if quantiles:
        size = 0.5 * (second - first + _EPSILON)
        center = first + size
    else:
        center, size = first, second + _EPSILON
    if "q01" in table and "q99" in table:
        low, high = table["q01"], table["q99"]
    else:
        low, high = first - 3 * second, first + 3 * second
    affine = Affine(low, high, np.ones(len(first), bool), center, size, size)
    if (size <= 0).any():
        raise StatisticsError(f"{where}: spreads must not be negative, got {size.tolist()}")
    require_limits(affine, where)
    return affine


def _read_table(
    checkpoint: Path, key: str | None
) -> tuple[Path, Mapping[str, Mapping[str, NDArray[np.float64]]]]:
    """Return the statistics' file, and state and actions -> statistic -> numbers."""
    path = _find(checkpoint, key)
    node = Node(read_json(path, "statistics", FOREIGN), str(path), remedy=_REMEDY)
    found = {}
    for part in ("state", "actions"):
        entries = node.field("norm_stats").field(part).fields()
        arrays = {
            name: np.array(entry.numbers(), np.float64)
            for name, entry in entries.items()
            if entry.value is not None
        }
        sizes = {len(values) for values in arrays.values()}
        finite = all(np.isfinite(values).all() for values in arrays.values())
        if len(sizes) != 1 or 0 in sizes or not finite or "mean" not in arrays:
            raise StatisticsError(
                f"{path}: {part!r} needs mean, std and quantiles of one length, all finite; "
                f"{_REMEDY}"
            )
        found[part] = arrays
    return path, found


def _find(checkpoint: Path, key: str | None) -> Path:
    # Assets' names are repositories' on the hub: one folder or two.
    folder = checkpoint / "assets"
    paths = {p.parent.relative_to(folder).as_posix(): p for p in folder.rglob(_STATISTICS)}
    if not paths:
        raise StatisticsError(f"{folder} holds no <asset>/{_STATISTICS}; {_REMEDY}")
    keys = sorted(paths)
    if key is None:
        if len(keys) > 1:
            raise StatisticsError(f"{folder} holds several assets; choose an unnorm key of {keys}")
        key = keys[0]
    if key not in paths:
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
        raise StatisticsError(
            f"unnorm key {key!r} is not in {folder}; it has {keys}. Did you mean {nearest!r}?"
        )
    return paths[key]
