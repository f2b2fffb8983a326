"""How a LeRobot checkpoint normalizes: its processor files, or the buffers of its old layout.

`policy_preprocessor.json` and `policy_postprocessor.json` list steps; a step's statistics lie in
the safetensors file that its `state_file` names, `<feature>.<statistic>`. Before these files there
were buffers in model.safetensors. Sources: lerobot 0.6.1 `processor/normalize_processor.py`, 0.3.3
`policies/normalize.py`. A feature without statistics passes unchanged upstream, without a word: it
is refused here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qvla_export.shared.errors import StatisticsError
from qvla_export.shared.git_lfs import refuse_pointer
from qvla_export.shared.json_documents import FOREIGN, Node, is_file_name, read_json
from qvla_export.shared.lerobot.lerobot_config import (
    ACTION,
    STATE,
    LeRobotConfig,
    read_lerobot_config,
    read_modes,
)
from qvla_export.shared.normalization import (
    Affine,
    Statistics,
    load_statistics,
    require_limits,
)
from qvla_export.shared.openpi.openpi_files import is_openpi, openpi_statistics, uses_quantiles
from qvla_export.shared.policy_interface import PolicyInterface

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
# Steps of every policy. What they rename is a data set's column to the policy's feature, which is
# the name that cameras have here; a batch is of one observation; devices are the engine's matter.
_COMMON_STEPS = (
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    NORMALIZER,
    UNNORMALIZER,
)
# A LeRobot checkpoint holds the statistics of one data set, which has no name there.
STATISTICS_KEY = "checkpoint"
_WEIGHTS = "model.safetensors"
_OLD_INPUTS, _OLD_OUTPUTS = "normalize_inputs.buffer_", "unnormalize_outputs.buffer_"
# Buffers of the old layout that are no weights; training's targets are the actions once more.
OLD_BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
_OLD_EPSILON = 1e-8
# Statistics that each mode takes: what is -1 and +1, or mean and standard deviation.
_LIMITS = {
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
# Where nothing says how far the demonstrations went: standard deviations, and no limit at all.
_USUAL_RANGE, _NO_LIMIT = 3.0, 1e6
_REMEDY = "save the processors with the policy again, or copy them from the training run"

_Table = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class ProcessorStep:
    """One step of a processor file."""

    # Its name in LeRobot's registry.
    name: str
    config: Node
    # Where its tensors lie; None for a step without any.
    state_file: Path | None


@dataclass(frozen=True)
class Normalizer:
    """How a step normalizes features, or brings them back."""

    # Feature -> statistic -> float64.
    tables: Mapping[str, _Table]
    # "VISUAL", "STATE", "ACTION" -> mode.
    modes: Mapping[str, str]
    epsilon: float
    # Names it in errors.
    where: str

    def affine(self, feature: str, kind: str, size: int) -> Affine:
        """Return the map of a feature of `size` numbers (of a picture, its three channels).

        Raises:
            StatisticsError: a statistic is missing, not finite, or of another size.
        """
        mode, table = self.modes.get(kind), self.tables.get(feature, {})
        if mode is None:
            raise StatisticsError(f"{self.where} does not say how {kind} is normalized; {_REMEDY}")
        low, high = self._range(feature, table, size)
        if mode == "IDENTITY":
            nothing, one = np.zeros(size), np.ones(size)
            return Affine(low, high, np.zeros(size, bool), nothing, one, one)
        if mode == "MEAN_STD":
            mean, std = (self._read(feature, name, size) for name in ("mean", "std"))
            affine = Affine(low, high, np.ones(size, bool), mean, std + self.epsilon, std)
        else:
            first, last = (self._read(feature, name, size) for name in _LIMITS[mode])
            half = 0.5 * np.where(last == first, self.epsilon, last - first)
            affine = Affine(low, high, np.ones(size, bool), first + half, half, half)
        if (affine.divisor <= 0).any():
            raise StatisticsError(
                f"{self.where}: {feature}: standard deviations and ranges must not be negative, "
                f"got {affine.factor.tolist()}; {_REMEDY}"
            )
        if kind != "VISUAL":
            require_limits(affine, f"{self.where}: {feature}")
        return affine

    def _range(
        self, feature: str, table: _Table, size: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How far the demonstrations went: least and greatest, quantiles, or a usual spread."""
        for names in _LIMITS.values():
            if all(name in table for name in names):
                low, high = (self._read(feature, name, size) for name in names)
                return low, high
        if "mean" in table and "std" in table:
            mean, std = (self._read(feature, name, size) for name in ("mean", "std"))
            return mean - _USUAL_RANGE * std, mean + _USUAL_RANGE * std
        return np.full(size, -_NO_LIMIT), np.full(size, _NO_LIMIT)

    def _read(self, feature: str, name: str, size: int) -> NDArray[np.float64]:
        table = self.tables.get(feature, {})
        if name not in table:
            raise StatisticsError(
                f"{self.where} has no {feature}.{name}, without which {feature} would pass "
                f"unchanged; it has {sorted(table) or 'nothing'} of it. {_REMEDY.capitalize()}"
            )
        values = table[name].reshape(-1)
        if values.shape != (size,) or not np.isfinite(values).all():
            raise StatisticsError(
                f"{self.where}: {feature}.{name} must be {size} finite numbers, got "
                f"{list(table[name].shape)}, {values[:8].tolist()}; {_REMEDY}"
            )
        return values


def has_processors(checkpoint: Path) -> bool:
    """Whether a checkpoint has processor files; without them it is of the old layout."""
    return (checkpoint / f"{PREPROCESSOR}.json").is_file()


def read_steps(
    checkpoint: Path, name: str, known: Collection[str] | None
) -> tuple[ProcessorStep, ...]:
    """Read a processor file.

    Args:
        checkpoint: the folder.
        name: `PREPROCESSOR` or `POSTPROCESSOR`.
        known: names of a family's own steps that are computed here, beside those of all; another
            is refused by name. None takes all.

    Raises:
        StatisticsError: an unknown step, or inputs in another type than float32.
        ArtifactError: the file is missing or malformed.
    """
    path = checkpoint / f"{name}.json"
    node = Node(read_json(path, "processor file", FOREIGN), str(path), remedy=_REMEDY)
    steps = []
    for step in node.field("steps").elements():
        kind = step.field("registry_name").text()
        if known is not None and kind not in {*known, *_COMMON_STEPS}:
            raise StatisticsError(
                f"{step.place}: step {kind!r} is not computed here, the policy would act without "
                f"it; such a policy's steps here: {', '.join(sorted({*known, *_COMMON_STEPS}))}"
            )
        config = step.field("config")
        if config.has("float_dtype") and config.field("float_dtype").value != "float32":
            raise config.field("float_dtype").wrong("inputs are float32 here, so it must be null")
        state_file = None
        if step.has("state_file"):
            stated = step.field("state_file").text()
            if not is_file_name(stated):
                raise step.field("state_file").wrong("a file of the checkpoint's folder is needed")
            state_file = checkpoint / stated
        steps.append(ProcessorStep(kind, config, state_file))
    return tuple(steps)


def read_normalizer(steps: tuple[ProcessorStep, ...], name: str, where: Path) -> Normalizer:
    """Return the only step that normalizes (or un-normalizes) among a processor's.

    Raises:
        StatisticsError: there is none or there are several, or its file is missing or damaged.
    """
    found = [step for step in steps if step.name == name]
    if len(found) != 1 or found[0].state_file is None:
        raise StatisticsError(f"{where} needs one step {name!r} with a state_file; {_REMEDY}")
    config, path = found[0].config, found[0].state_file
    modes = read_modes(config.field("norm_map"))
    tables: dict[str, dict[str, NDArray[np.float64]]] = {}
    for key, values in _read_tensors(path).items():
        # Features' names contain dots.
        feature, _, statistic = key.rpartition(".")
        tables.setdefault(feature, {})[statistic] = values
    return Normalizer(tables, modes, config.field("eps").number(), str(path))


def old_normalizers(checkpoint: Path, config: LeRobotConfig) -> tuple[Normalizer, Normalizer]:
    """Return what normalizes and un-normalizes in a checkpoint of the old layout.

    Raises:
        StatisticsError: the weights hold no such buffers, or are damaged.
    """
    path = checkpoint / _WEIGHTS
    inputs: dict[str, dict[str, NDArray[np.float64]]] = {}
    outputs: dict[str, dict[str, NDArray[np.float64]]] = {}
    features = [STATE, ACTION, *(camera.key for camera in config.cameras.values())]
    stored = {key.replace(".", "_"): key for key in features}
    for key, values in _read_tensors(path, OLD_BUFFERS).items():
        buffer, _, statistic = key.rpartition(".")
        for start, tables in ((_OLD_INPUTS, inputs), (_OLD_OUTPUTS, outputs)):
            feature = stored.get(buffer.removeprefix(start))
            if buffer.startswith(start) and feature is not None:
                tables.setdefault(feature, {})[statistic] = values
    if not inputs and not outputs:
        raise StatisticsError(
            f"{checkpoint} has neither {PREPROCESSOR}.json nor statistics in {_WEIGHTS}; {_REMEDY}"
        )
    where = f"{path} (statistics among the weights)"
    parts = (inputs, outputs)
    before, after = (Normalizer(tables, config.modes, _OLD_EPSILON, where) for tables in parts)
    return before, after


def lerobot_statistics(
    config: LeRobotConfig, before: Normalizer, after: Normalizer, key: str | None
) -> Statistics:
    """Return what normalizes a policy's state and un-normalizes its actions.

    Raises:
        StatisticsError: they are missing or do not fit, or a data set is named.
    """
    if key not in (None, STATISTICS_KEY):
        raise StatisticsError(
            f"a LeRobot checkpoint holds the statistics of one data set; leave --unnorm-key {key} "
            "out"
        )
    state = before.affine(STATE, "STATE", config.state_dim) if config.state_dim else None
    return Statistics(STATISTICS_KEY, after.affine(ACTION, "ACTION", config.action_dim), state)


def checkpoint_statistics(
    checkpoint: Path, key: str | None, interface: PolicyInterface, file_name: str
) -> Statistics:
    """Return a checkpoint's statistics, whatever its layout.

    Args:
        checkpoint: its folder.
        key: data set whose statistics are wanted; None for the only one.
        interface: of its policy.
        file_name: of the file that holds them where no processor file does.

    Raises:
        StatisticsError, ArtifactError: they are missing or do not fit.
    """
    sizes = (interface.action_dim, interface.state_dim)
    if is_openpi(checkpoint):
        return openpi_statistics(checkpoint, key, uses_quantiles(checkpoint), sizes)
    if interface.normalization != "files":
        return load_statistics(checkpoint / file_name, key, interface.normalization, *sizes)
    config = read_lerobot_config(checkpoint)
    before, after = read_normalizers(checkpoint, config, None)
    return lerobot_statistics(config, before, after, key)


def read_normalizers(
    checkpoint: Path, config: LeRobotConfig, known: Collection[str] | None
) -> tuple[Normalizer, Normalizer]:
    """Return what normalizes and un-normalizes, from processor files or the old layout.

    Args:
        checkpoint: its folder.
        config: of its policy.
        known: as `read_steps`.

    Raises:
        StatisticsError, ArtifactError: as `read_steps` and `read_normalizer`.
    """
    if not has_processors(checkpoint):
        return old_normalizers(checkpoint, config)
    normalizers = []
    for name, step in ((PREPROCESSOR, NORMALIZER), (POSTPROCESSOR, UNNORMALIZER)):
        steps = read_steps(checkpoint, name, known)
        normalizers.append(read_normalizer(steps, step, checkpoint / f"{name}.json"))
    return normalizers[0], normalizers[1]


def _read_tensors(path: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, NDArray[np.float64]]:
    """Return a safetensors file's tensors by key, those whose key begins with a prefix."""
    if not path.is_file():
        raise StatisticsError(f"statistics not found: {path}; {_REMEDY}")
    try:
        with safe_open(path, framework="np") as file:
            keys = [key for key in file.keys() if key.startswith(prefixes)]  # noqa: SIM118  # no dict
            return {key: np.asarray(file.get_tensor(key), np.float64) for key in keys}
    except (SafetensorError, OSError, TypeError) as error:
        refuse_pointer(path)
        raise StatisticsError(
            f"{path} is not a complete safetensors file of numbers ({error}); {_REMEDY}"
        ) from error
