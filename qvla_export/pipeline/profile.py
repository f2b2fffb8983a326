"""The step that times actions, span by span, of policies that take turns."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from engines.layer_times import LayerTimes
    from jetson.latency.cold_start import ColdStart
    from jetson.latency.comparison import LatencyComparison
    from jetson.latency.measure import ProfileSubject
    from qvla_export.shared.latency_statistics import Deadline
    from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class ProfileRequest:
    """Which policies are timed, how often, and what else is measured of them."""

    # Bundles or servers; the first is the baseline.
    sources: tuple[PolicySource, ...]
    # Actions of each: those that count, and those before them.
    samples: int = 200
    warmup: int = 10
    # MCAP file whose observations are sent; None for blank pictures.
    recording: Path | None = None
    # Until when actions are wanted.
    deadline: "Deadline | None" = None
    # Timed passes in which every layer is timed too; 0 for none.
    layer_passes: int = 0
    # New processes, each from its start to its first action, and its memory; 0 for none, None for
    # one of each bundle.
    cold_starts: int | None = 0
    # Files in trtexec's JSON, of one policy: every action, and every layer.
    export_times: Path | None = None
    export_layers: Path | None = None
    # Of the order in which policies take turns.
    seed: int = 0

    def require_possible(self) -> None:
        """Refuse what these policies cannot be asked for, before anything is opened.

        Raises:
            QvlaError: trtexec's files are wanted of several policies, or layers or starts of what
                is no bundle here.
        """
        if (self.export_times or self.export_layers) and len(self.sources) != 1:
            raise QvlaError(
                f"trtexec's files hold one engine, got {len(self.sources)} policies; profile one "
                "at a time with --export-times and --export-profile"
            )
        others = [source.place for source in self.sources if source.kind != "bundle"]
        if (self.layer_passes or self.cold_starts) and others:
            raise QvlaError(
                "--layers, --export-profile and --cold-starts need bundle folders, not "
                f"{others}; export the policy, or run the command where the server is"
            )


def profile_policies(
    request: ProfileRequest, output: Path | None, on_progress: OnProgress = ignore
) -> "LatencyComparison":
    """Time decode, preprocess, engine, postprocess and encode, policies interleaved.

    Args:
        request: what is measured of which policies.
        output: latency JSON to write; None writes none.
        on_progress: hears of every action.

    Raises:
        QvlaError: the request is not possible, or a policy does not open or act.
    """
    from jetson.latency.measure import profile_latency

    request.require_possible()
    with ExitStack() as stack:
        subjects = _open_policies(request.sources, stack)
        policies = {name: subject.policy for name, subject in subjects.items()}
        observations = _observations(request.recording, policies)
        comparison = profile_latency(
            subjects,
            observations,
            request.warmup,
            request.samples,
            bar(on_progress, "latency"),
            request.deadline,
            request.seed,
        )
        if request.layer_passes:
            layers = _layer_times(policies, observations[0], request.layer_passes)
            comparison = replace(comparison, layers=layers)
    if request.cold_starts != 0:
        bundles = [source for source in request.sources if source.kind == "bundle"]
        starts = _cold_starts(bundles, request.cold_starts or 1)
        comparison = replace(comparison, cold_starts=starts)
    if output is not None:
        comparison.save(output)
    _write_trtexec_files(request, comparison)
    return comparison


def _open_policies(
    sources: Sequence[PolicySource], stack: ExitStack
) -> "dict[str, ProfileSubject]":
    """Return policies by place, closed with the stack, how they run and what loading took."""
    from jetson.latency.measure import ProfileSubject

    subjects: dict[str, ProfileSubject] = {}
    for source in sources:
        start = time.perf_counter()
        policy: Any = source()
        load_ms = (time.perf_counter() - start) * 1e3
        threads = "all" if source.threads is None else source.threads
        form = getattr(getattr(policy, "engine", None), "weight_form", source.weights)
        conditions = "" if source.kind == "server" else f"{threads} threads, {form}"
        subjects[source.place] = ProfileSubject(policy, load_ms, conditions)
        close = getattr(policy, "close", getattr(getattr(policy, "engine", None), "close", None))
        if close is not None:
            stack.callback(close)
    return subjects


def _observations(recording: Path | None, policies: Mapping[str, Any]) -> "Sequence[Observation]":
    if recording is None:
        from jetson.serving.policy_contract import contract_of

        return [contract_of(next(iter(policies.values()))).blank_observation()]
    from jetson.recording.reader import Recording

    return Recording(recording).observations()


def _layer_times(
    policies: Mapping[str, Any], observation: "Observation", passes: int
) -> "dict[str, LayerTimes]":
    return {
        name: policy.engine.layer_times(policy.bundle.processor.feeds(observation), passes)
        for name, policy in policies.items()
    }


def _cold_starts(sources: Sequence[PolicySource], count: int) -> "dict[str, tuple[ColdStart, ...]]":
    from jetson.latency.cold_start import measure_cold_starts

    return {
        source.place: measure_cold_starts(Path(source.place), count, source.threads, source.weights)
        for source in sources
    }


def _write_trtexec_files(request: ProfileRequest, comparison: "LatencyComparison") -> None:
    from jetson.latency.trtexec_json import profile_json, times_json

    (first, *_) = comparison.profiles
    if request.export_times is not None:
        write_json(request.export_times, times_json(first))
    if request.export_layers is not None:
        write_json(request.export_layers, profile_json(comparison.layers[first.name]))
