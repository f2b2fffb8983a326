"""The noun `CalibrationSet`: observations drawn from episodes, with a held-out split."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from calibration.benchmarks.metaworld.demonstrations import Recording, record_episode
from calibration.benchmarks.metaworld.simulator import ACTION_NAMES, Simulator
from calibration.benchmarks.metaworld.tasks import TASKS, UNIT_MM, find_task
from calibration.demonstrated_actions import (
    FOLLOWING,
    Demonstrations,
    following_actions,
    names_of,
    pad_following,
)
from calibration.frame_draws import Drawable, DrawnRows, draw_parts
from calibration.packed_observations import content, content_digest, pack, unpack
from calibration.sources.base import DataSource, ReadsAhead
from calibration.sources.formats import open_source
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.lerobot_writer import Episode
from qvla_export.shared.artifacts import (
    new_folder,
    read_json,
    require_fields,
    write_bytes,
    write_json,
)
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation

_FORMAT = "qvla-calibration-1"
_DESCRIPTION = "calibration.json"
_TENSORS = "observations.safetensors"
_DEMONSTRATIONS = "demonstrations.safetensors"
FRAMES_PER_EPISODE = 2
_REMEDY = "make it anew with qvla calibrate"


@dataclass(frozen=True)
class CalibrationSet:
    """Observations to measure on and others, of other episodes, to judge by."""

    observations: tuple[Observation, ...]
    held_out: tuple[Observation, ...]
    # Where they came from and how they were drawn.
    source: Mapping[str, Any]
    # How many of `observations` come from each episode, one after the other and in its order;
    # empty where not known.
    episode_lengths: tuple[int, ...] = ()
    # What was done from the held-out ones on; None where no actions were recorded.
    demonstrations: Demonstrations | None = None

    def __repr__(self) -> str:
        return f"<CalibrationSet: {describe(self)}>"

    @staticmethod
    def from_dataset(
        root: Path | str,
        cameras: Mapping[str, str],
        count: int = 64,
        held_out: int = 64,
        seed: int = 0,
        state_column: str | None = "observation.state",
        frames_per_episode: int = FRAMES_PER_EPISODE,
    ) -> "CalibrationSet":
        """Draw observations from a data set of any format; held-out ones come from other episodes.

        Args:
            root: folder or file of the data set.
            cameras: the policy's name of a camera -> the data set's column,
                {"full_image": "observation.images.front"}.
            count: observations to measure on.
            held_out: observations to judge by.
            seed: of the drawing.
            state_column: of the proprioceptive state; None for a policy without one.
            frames_per_episode: observations drawn from one episode.

        Raises:
            QvlaError: the data set lacks a column or has too few episodes.
        """
        dataset = open_source(Path(root), KeyMap(dict(cameras), state_column))
        return sample_dataset(dataset, count, held_out, seed, frames_per_episode)

    @staticmethod
    def from_simulator(
        tasks: Sequence[str] = tuple(TASKS),
        count: int = 64,
        held_out: int = 64,
        seed: int = 0,
        frames_per_episode: int = FRAMES_PER_EPISODE,
    ) -> "CalibrationSet":
        """Draw observations from freshly simulated expert episodes of Meta-World tasks, in turn.

        Raises:
            QvlaError: a task is unknown, or nothing is asked for.
        """
        return sample_simulator(tasks, count, held_out, seed, frames_per_episode)

    @property
    def digest(self) -> str:
        """SHA-256 over every observation's content and order."""
        digest = hashlib.sha256()
        for observation in (*self.observations, *self.held_out):
            digest.update(content(observation))
        digest.update(str(len(self.observations)).encode())
        return digest.hexdigest()

    def others(self, observations: Iterable[Observation]) -> tuple[Observation, ...]:
        """Return those that are none of the set's `observations`, by their content."""
        own = {content_digest(observation) for observation in self.observations}
        return tuple(item for item in observations if content_digest(item) not in own)

    def save(self, path: Path) -> None:
        """Write the folder atomically.

        Raises:
            QvlaError: there are no observations, or they differ in cameras, image size or state.
        """
        everything = [*self.observations, *self.held_out]
        if not everything:
            raise QvlaError("a calibration set needs at least one observation, got none")
        packed = pack(everything)
        description = {
            "format": _FORMAT,
            "digest": self.digest,
            "calibration": len(self.observations),
            "held_out": len(self.held_out),
            "cameras": list(everything[0].images),
            "source": dict(self.source),
            "episode_lengths": list(self.episode_lengths),
            "instructions": [o.instruction for o in everything],
        }
        actions = self.demonstrations
        if actions is not None:
            description["demonstrations"] = actions.describe()
        with new_folder(path) as folder:
            write_bytes(folder / _TENSORS, packed)
            if actions is not None:
                write_bytes(folder / _DEMONSTRATIONS, actions.pack())
            write_json(folder / _DESCRIPTION, description)

    @staticmethod
    def load(path: Path) -> "CalibrationSet":
        """Read a folder and check its digest.

        Raises:
            ArtifactError: a file is missing, truncated or changed.
        """
        description = read_json(path / _DESCRIPTION, "calibration set")
        if not isinstance(description, dict) or description.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is not of format {_FORMAT!r}; {_REMEDY}")
        fields = ("digest", "calibration", "held_out", "cameras", "instructions", "source")
        require_fields(description, fields, f"calibration set {path}")
        try:
            everything = unpack(
                (path / _TENSORS).read_bytes(), description["cameras"], description["instructions"]
            )
            count = int(description["calibration"])
            source = dict(description["source"])
            # Sets written before episodes were told apart lack it.
            lengths = tuple(int(n) for n in description.get("episode_lengths", ()))
            about, actions = description.get("demonstrations"), None
            if about is not None:
                actions = Demonstrations.unpack((path / _DEMONSTRATIONS).read_bytes(), about)
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is incomplete or damaged ({error}); {_REMEDY}") from error
        loaded = CalibrationSet(
            tuple(everything[:count]), tuple(everything[count:]), source, lengths, actions
        )
        if loaded.digest != description["digest"]:
            raise ArtifactError(
                f"{path} was changed after it was made: digest {loaded.digest[:16]}, "
                f"recorded {str(description['digest'])[:16]}; {_REMEDY}"
            )
        return loaded


def sample_dataset(
    dataset: DataSource,
    count: int,
    held_out: int,
    seed: int,
    frames_per_episode: int = FRAMES_PER_EPISODE,
    skip_bad_frames: bool = False,
) -> CalibrationSet:
    """Draw observations from recorded episodes; held-out ones come from other episodes.

    Args:
        dataset: the recording.
        count: observations to measure on.
        held_out: observations to judge by.
        seed: decides episodes and frames.
        frames_per_episode: frames taken from one episode.
        skip_bad_frames: whether frames without a usable state or instruction are left out, and
            counted in the set's source as `bad_frames`.

    Raises:
        BadFrame: a frame has no usable state or instruction, and such are not left out.
        QvlaError: the data set has too few episodes, or nothing is asked for.
    """
    _require_counts(count, held_out, frames_per_episode)
    sizes, order = dataset.episode_lengths, drawing_order(dataset, seed)
    needed = -(-count // frames_per_episode) - (-held_out // frames_per_episode)
    if needed > len(order):
        raise QvlaError(
            f"{count} + {held_out} observations need {needed} episodes, {dataset.root} has "
            f"{len(order)}; ask for fewer or record more"
        )

    def observation(episode: int, frame: int) -> Observation:
        return dataset.frame(episode, frame).observation

    ahead = dataset if isinstance(dataset, ReadsAhead) else None
    episodes = (
        Drawable(
            n,
            sizes[n],
            partial(ahead.check if ahead else dataset.frame, n),
            partial(observation, n),
            partial(following_actions, dataset, n),
        )
        for n in map(int, order)
    )
    source = {**dataset.identity(), "seed": seed}
    if skip_bad_frames:
        source["bad_frames"] = 0
    parts = _draw(episodes, count, held_out, seed, source, frames_per_episode)
    if ahead:
        ahead.expect([(d.episode.number, row) for part in parts for d in part for row in d.rows])
    return _with_names(_read(parts, source), lambda dim: names_of(dataset, dim))


def drawing_order(dataset: DataSource, seed: int) -> list[int]:
    """Return the numbers of a recording's episodes in the order they are drawn from."""
    order = np.random.default_rng(seed).permutation(len(dataset.episode_lengths))
    return [int(number) for number in order]


def sample_simulator(
    tasks: Sequence[str],
    count: int,
    held_out: int,
    seed: int,
    frames_per_episode: int = FRAMES_PER_EPISODE,
) -> CalibrationSet:
    """Draw observations from freshly recorded, disturbed expert episodes of all tasks in turn.

    Raises:
        QvlaError: nothing is asked for, or a task is unknown.
    """
    _require_counts(count, held_out, frames_per_episode)
    if not tasks:
        raise QvlaError("drawing from the simulator needs at least one task, got none")
    recording = Recording(seed=seed)

    def episodes() -> Iterable[Drawable]:
        needed = -(-count // frames_per_episode) - (-held_out // frames_per_episode)
        rounds = -(-needed // len(tasks))
        recorded: dict[str, list[Episode]] = {}
        for name in tasks:
            with Simulator(find_task(name)) as simulator:
                recorded[name] = [record_episode(simulator, recording, i) for i in range(rounds)]
        ordered = (recorded[name][i] for i in range(rounds) for name in tasks)
        return (
            Drawable(n, len(e), _no_check, e.observation, partial(_following, e.action))
            for n, e in enumerate(ordered)
        )

    source: dict[str, Any] = {"simulator": list(tasks), "seed": seed}
    parts = _draw(episodes(), count, held_out, seed, source, frames_per_episode)
    return _with_names(_read(parts, source), lambda _: ACTION_NAMES, UNIT_MM)


def _no_check(frame: int) -> None:
    """Find nothing wrong with a frame of the simulator."""


def _following(actions: NDArray[np.float32], frame: int) -> NDArray[np.float32]:
    return actions[frame : frame + FOLLOWING]


def _with_names(
    drawn: CalibrationSet, names: Callable[[int], tuple[str, ...]], unit_mm: float | None = None
) -> CalibrationSet:
    plain = drawn.demonstrations
    if plain is None:
        return drawn
    named = replace(plain, names=names(plain.actions.shape[-1]), unit_mm=unit_mm)
    return replace(drawn, demonstrations=named)


def _require_counts(count: int, held_out: int, frames_per_episode: int) -> None:
    if count < 1 or held_out < 1 or frames_per_episode < 1:
        raise QvlaError(
            "observations to measure on, to judge by and of one episode must be at least 1 each, "
            f"got {count}, {held_out} and {frames_per_episode}"
        )


def _draw(
    episodes: Iterable[Drawable],
    count: int,
    held_out: int,
    seed: int,
    source: dict[str, Any],
    frames: int,
) -> list[list[DrawnRows]]:
    """Choose frames to measure on and to judge by, and say in `source` how."""
    skip_bad = "bad_frames" in source
    parts = draw_parts(episodes, (count, held_out), frames, seed, skip_bad)
    source |= {"count": count, "held_out": held_out}
    if skip_bad:
        source["bad_frames"] = sum(drawn.skipped for part in parts for drawn in part)
    if frames != FRAMES_PER_EPISODE:
        source["frames_per_episode"] = frames
    return parts


def _read(parts: Sequence[Sequence[DrawnRows]], source: Mapping[str, Any]) -> CalibrationSet:
    """Read frames that were chosen."""
    observations, held_out = (
        tuple(drawn.episode.observation(row) for drawn in part for row in drawn.rows)
        for part in parts
    )
    padded = pad_following([d.episode.following(row) for d in parts[1] for row in d.rows])
    # An episode of bad frames alone gives nothing.
    lengths = tuple(len(drawn.rows) for drawn in parts[0] if drawn.rows)
    demonstrations = None if padded is None else Demonstrations(padded)
    return CalibrationSet(observations, held_out, source, lengths, demonstrations)


def describe(calibration: CalibrationSet) -> str:
    """Return one line that says what a calibration set holds, and of which columns."""
    source = calibration.source
    bad = source.get("bad_frames")
    columns = ", ".join(f"{name}: {c}" for name, c in dict(source.get("columns", {})).items() if c)
    places = str(source["dataset"]) if "dataset" in source else "the simulator"
    return (
        f"{len(calibration.observations)} observations, {len(calibration.held_out)} held out, "
        + (f"{bad} bad frames left out, " if bad is not None else "")
        + f"from {places}"
        + (f" ({columns})" if columns else "")
    )
