"""What un-normalizes actions: the statistics of a bundle, and those of a checkpoint folder."""

import difflib
import shlex
from dataclasses import dataclass
from pathlib import Path

from jetson.doctor.bundle_facts import BundleFacts
from jetson.doctor.finding import BoardFinding, Check
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.lerobot.lerobot_config import is_lerobot
from qvla_export.shared.lerobot.lerobot_statistics import checkpoint_statistics
from qvla_export.shared.normalization import Statistics, read_statistics
from qvla_export.shared.policy_interface import (
    CONFIG_NAME,
    INTERFACES,
    PolicyInterface,
    fitting_presets,
    load_interface,
)

FILE_NAME = "dataset_statistics.json"
NO_CHECKPOINT = "no checkpoint given"
_BUNDLE = Check("bundle", "a file that was changed or cut acts otherwise", "as its manifest says")
_BUNDLE_KEY = Check("unnorm key of the bundle", "another data set's limits scale every action")
_CONFIG = Check(
    "policy description", "a checkpoint does not say its cameras, chunk and dimensions", CONFIG_NAME
)
_KEY = Check("unnorm key of the checkpoint", "another data set's limits scale every action")
_STORED = Check(
    "parts of the checkpoint",
    "a part that is not used, or a weight that is no number, makes the policy act wrongly",
    "every file used, every weight finite",
)


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint folder's description and statistics, or why they cannot be read."""

    path: Path
    # Data set that was asked for; None for the only one.
    key: str | None
    config: PolicyInterface | None
    config_problem: str
    # Data sets in the statistics file.
    keys: tuple[str, ...]
    statistics: Statistics | None
    statistics_problem: str
    # Dimensions of the actions and of the state that the statistics are of; None if not known.
    sizes: tuple[int, int | None] | None = None
    # Why the policy cannot be loaded, empty where it can be; None where torch is not installed.
    load_problem: str | None = None
    # Whether neither a preset nor a file of the folder says what `config` holds.
    is_assumed: bool = False


def read_checkpoint(path: Path, key: str | None, preset: str | None = None) -> CheckpointFacts:
    """Return what a checkpoint says of its actions; never an error.

    Args:
        path: its folder.
        key: data set whose statistics are wanted; None for the only one.
        preset: "libero", "aloha" or "bridge", instead of a description beside the weights.
    """
    config, config_problem = None, ""
    try:
        config = load_interface(path, preset, key)
    except (QvlaError, OSError, ValueError, AttributeError) as error:
        config_problem = str(error)
    statistics, problem, keys = None, "", _keys(path / FILE_NAME)
    try:
        if config is not None:
            statistics = checkpoint_statistics(path, key, config, FILE_NAME)
    except (QvlaError, OSError, ValueError, TypeError) as error:
        problem = str(error)
    sizes = _sizes(path / FILE_NAME, key)
    # LeRobot's config.json says all of it, as a preset and `CONFIG_NAME` do.
    is_said = preset is not None or (path / CONFIG_NAME).is_file() or _is_lerobot(path)
    return CheckpointFacts(
        path,
        key,
        config,
        config_problem,
        keys,
        statistics,
        problem,
        sizes=sizes,
        is_assumed=not is_said,
    )


def _is_lerobot(path: Path) -> bool:
    try:
        return is_lerobot(path)
    except QvlaError:
        return False


def _keys(path: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(read_statistics(path)[1]))
    except (QvlaError, OSError, ValueError):
        return ()


def _sizes(path: Path, key: str | None) -> tuple[int, int | None] | None:
    """Return the dimensions of the actions and of the state; None where the file says none."""
    try:
        table = read_statistics(path)[1]
        entry = table[next(iter(table)) if key is None else key]
        action, state = (
            max((len(v) for v in entry.get(part, {}).values() if isinstance(v, list)), default=None)
            for part in ("action", "proprio")
        )
    except (QvlaError, OSError, ValueError, KeyError, AttributeError):
        return None
    return None if action is None else (action, state)


def check_bundle(facts: BundleFacts | None) -> BoardFinding:
    """Look whether a bundle is whole and for a target of this version."""
    if facts is None:
        return _BUNDLE.inapplicable("no bundle given")
    if facts.bundle is None or facts.target is None:
        return _BUNDLE.error(
            facts.problem,
            "rsync -a --checksum --delete HOST:RUN/settings/SETTING/bundle/ "
            f"{facts.shell_path}/; or on the host: "
            "qvla export --run RUN --setting SETTING --policy CHECKPOINT",
        )
    return _BUNDLE.ok(f"{facts.bundle.digest[:16]}, target {facts.target.name}")


def check_bundle_key(facts: BundleFacts | None, key: str | None) -> BoardFinding:
    """Look whether a bundle un-normalizes as the data set that was asked for."""
    if facts is None or facts.bundle is None:
        return _BUNDLE_KEY.inapplicable("no bundle to look into")
    found = facts.bundle.processor.statistics.key
    if key in (None, found):
        return _BUNDLE_KEY.ok(found)
    return _BUNDLE_KEY.error(
        found,
        f"ask for the bundle's own: --unnorm-key {shlex.quote(found)}; or on the host: qvla export "
        f"--unnorm-key {shlex.quote(str(key))} --run RUN --setting SETTING --policy CHECKPOINT",
        wanted=str(key),
    )


def check_config(facts: CheckpointFacts | None) -> BoardFinding:
    """Look whether a checkpoint's cameras, chunk and dimensions are known."""
    if facts is None:
        return _CONFIG.inapplicable(NO_CHECKPOINT)
    if facts.config is None:
        return _CONFIG.error(
            facts.config_problem,
            f"name a preset: --preset {'|'.join(sorted(INTERFACES))}; or write "
            f"{shlex.quote(str(facts.path))}/{CONFIG_NAME} as in checkpoints/reference",
        )
    config = facts.config
    source = f"; assumed, as no {CONFIG_NAME} says it" if facts.is_assumed else ""
    return _CONFIG.ok(
        f"cameras {', '.join(config.cameras)}; {config.horizon} actions of {config.action_dim}, "
        f"state {config.state_dim}{source}"
    )


def check_key(facts: CheckpointFacts | None) -> BoardFinding:
    """Look whether a checkpoint's statistics hold the data set that un-normalizes actions."""
    if facts is None:
        return _KEY.inapplicable(NO_CHECKPOINT)
    if facts.config is None:
        return _KEY.inapplicable("the policy's dimensions are not known")
    if facts.statistics is not None:
        return _KEY.ok(facts.statistics.key)
    return _KEY.error(facts.statistics_problem, _key_remedy(facts), _wanted_key(facts))


def check_stored(facts: CheckpointFacts | None) -> BoardFinding:
    """Look whether a checkpoint can be loaded with all that it stores, as `qvla deploy` does."""
    if facts is None:
        return _STORED.inapplicable(NO_CHECKPOINT)
    folder = shlex.quote(str(facts.path))
    if facts.load_problem is None:
        return _STORED.unknown(
            "files are right; without torch their numbers were not looked at",
            f"on the host: qvla doctor --checkpoint {folder}",
        )
    if not facts.load_problem:
        return _STORED.ok("all are used")
    if facts.load_problem in (facts.config_problem, facts.statistics_problem):
        return _STORED.inapplicable("its description or statistics are to be mended first")
    # Said again, as a table breaks the commands in it.
    remedy = f"{facts.load_problem}; then look again: qvla doctor {folder}"
    return _STORED.error(facts.load_problem, remedy)


def _wanted_key(facts: CheckpointFacts) -> str:
    return f"one of {', '.join(facts.keys)}" if facts.keys else FILE_NAME


def _key_remedy(facts: CheckpointFacts) -> str:
    folder = shlex.quote(str(facts.path))
    if not facts.keys:
        return (
            f"copy {FILE_NAME} of the training run: rsync -a HOST:CHECKPOINT/{FILE_NAME} {folder}/"
        )
    if facts.key in facts.keys or (facts.key is None and len(facts.keys) == 1):
        # The key is there, its numbers do not fit.
        others = [key for key in facts.keys if key != facts.key]
        other = f"--unnorm-key {shlex.quote(others[0])}, or " if others and facts.key else ""
        preset = fitting_presets(*facts.sizes) if facts.sizes is not None else ""
        return (
            f"{other}mend what is said of {folder}/{FILE_NAME}, or correct action_dim, state_dim "
            f"and normalization in {folder}/{CONFIG_NAME}"
            f"{preset}"
        )
    nearest = difflib.get_close_matches(facts.key or "", facts.keys, n=1, cutoff=0.0)[0]
    first = [nearest] if facts.key is not None else []
    shown = [*first, *(key for key in facts.keys if key not in first)]
    return " or ".join(f"--unnorm-key {shlex.quote(key)}" for key in shown)
