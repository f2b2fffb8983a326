"""`qvla profile`: what an action takes, span by span."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from qvla_export.cli.options import A_BUNDLE_OR_SERVER, A_RECORDING, ThreadsOption, WeightsOption
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from engines.layer_times import LayerTimes
    from jetson.latency.comparison import LatencyComparison
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.shared.latency_statistics import Deadline
    from qvla_export.shared.observation import Observation

# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 120


def profile(
    bundles: Annotated[
        list[str],
        typer.Argument(
            help="Bundles or server URLs; first = baseline.", callback=A_BUNDLE_OR_SERVER.require
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Latency JSON to write.")],
    samples: Annotated[int, typer.Option(help="Actions of each policy.")] = 200,
    warmup: Annotated[int, typer.Option(help="Actions before the samples.")] = 10,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="MCAP file whose observations are sent; default: blank pictures.",
            callback=A_RECORDING.require,
        ),
    ] = None,
    threads: ThreadsOption = None,
    weights: WeightsOption = "packed",
    rate: Annotated[
        float | None, typer.Option(help="Commands a second; counts what comes too late.")
    ] = None,
    execute: Annotated[
        int, typer.Option(min=1, help="Commands sent while the next chunk is computed.")
    ] = 1,
    cold_starts: Annotated[
        int, typer.Option(min=0, help="New processes, each from its start to its first action.")
    ] = 0,
    layers: Annotated[
        bool, typer.Option(help="Time every layer too, in passes of their own.")
    ] = False,
    layer_passes: Annotated[int, typer.Option(min=1, help="Timed passes of --layers.")] = 50,
    export_times: Annotated[
        Path | None,
        typer.Option("--export-times", "--exportTimes", help="Every action, in trtexec's JSON."),
    ] = None,
    export_profile: Annotated[
        Path | None,
        typer.Option("--export-profile", "--exportProfile", help="--layers in trtexec's JSON."),
    ] = None,
) -> None:
    """Measure decode, preprocess, engine, postprocess and encode, policies interleaved."""
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.shared.latency_statistics import Deadline

    deadline = None if rate is None else Deadline(rate, execute)
    layers = layers or export_profile is not None
    _require_one(bundles, export_times, export_profile)
    sources = [PolicySource(place, threads=threads, weights=weights) for place in bundles]
    _require_bundles(sources, layers, cold_starts)
    said = f"{'all' if threads is None else threads} threads, {weights}"
    with ExitStack() as stack:
        opened, load_ms = _open(sources, stack)
        observations = _observations(recording, opened)
        compared = _measure(opened, observations, (warmup, samples), load_ms, said, deadline)
        if layers:
            compared = replace(compared, layers=_layer_times(opened, observations, layer_passes))
    if cold_starts:
        compared = replace(compared, cold_starts=_cold_starts(sources, cold_starts))
    compared.save(output)
    _export(compared, export_times, export_profile)
    _show(compared)
    typer.echo(f"latency: {output}")


def _require_one(bundles: Sequence[str], *exports: Path | None) -> None:
    if any(exports) and len(bundles) != 1:
        raise QvlaError(
            f"trtexec's files hold one engine, got {len(bundles)} policies; profile one at a time "
            "with --export-times and --export-profile"
        )


def _require_bundles(sources: "Sequence[PolicySource]", layers: bool, cold_starts: int) -> None:
    others = [source.place for source in sources if source.kind != "bundle"]
    if (layers or cold_starts) and others:
        raise QvlaError(
            f"--layers, --export-profile and --cold-starts need bundle folders, not {others}; "
            "export the policy, or run the command where the server is"
        )


def _open(
    sources: "Sequence[PolicySource]", stack: ExitStack
) -> tuple[dict[str, Any], dict[str, float]]:
    opened: dict[str, Any] = {}
    load_ms: dict[str, float] = {}
    for source in sources:
        start = time.perf_counter()
        policy = opened[source.place] = source()
        load_ms[source.place] = (time.perf_counter() - start) * 1e3
        close = getattr(policy, "close", getattr(getattr(policy, "engine", None), "close", None))
        if close is not None:
            stack.callback(close)
    return opened, load_ms


def _observations(recording: Path | None, opened: Mapping[str, Any]) -> "Sequence[Observation]":
    if recording is None:
        from jetson.serving.policy_contract import contract_of

        return [contract_of(next(iter(opened.values()))).blank_observation()]
    from jetson.recording.reader import Recording

    return Recording(recording).observations()


def _measure(
    opened: Mapping[str, Any],
    observations: "Sequence[Observation]",
    rounds: tuple[int, int],
    load_ms: Mapping[str, float],
    conditions: str,
    deadline: "Deadline | None",
) -> "LatencyComparison":
    from jetson.latency.measure import profile_latency
    from qvla_export.pipeline.plan import bar

    with Progress(console=Console(stderr=True)) as progress:
        return profile_latency(
            opened,
            observations,
            *rounds,
            bar(progress, "latency"),
            load_ms,
            {name: conditions for name in opened if not name.startswith("http")},
            deadline,
        )


def _layer_times(
    opened: Mapping[str, Any], observations: "Sequence[Observation]", passes: int
) -> "dict[str, LayerTimes]":
    return {
        name: policy.engine.layer_times(policy.bundle.processor.feeds(observations[0]), passes)
        for name, policy in opened.items()
    }


def _cold_starts(sources: "Sequence[PolicySource]", count: int) -> dict[str, Any]:
    from jetson.latency.cold_start import measure_cold_starts

    return {
        source.place: measure_cold_starts(Path(source.place), count, source.threads, source.weights)
        for source in sources
    }


def _export(compared: "LatencyComparison", times: Path | None, layers: Path | None) -> None:
    from jetson.latency.trtexec_json import profile_json, times_json

    (first, *_) = compared.profiles
    if times is not None:
        write_json(times, times_json(first))
    if layers is not None:
        write_json(layers, profile_json(compared.layers[first.name]))


def _show(compared: "LatencyComparison") -> None:
    from jetson.doctor.examination import slow_settings
    from qvla_export.cli.judge.latency_tables import layer_heading, layer_tables, profile_tables

    console = Console(width=_TABLE_WIDTH)
    for table in profile_tables(compared):
        console.print(table)
    for name, times in compared.layers.items():
        typer.echo(layer_heading(name, times))
        for table in layer_tables(times):
            console.print(table)
    if slow := slow_settings(compared.profiles[0].board_before):
        typer.echo(f"slower than it could be, see qvla doctor: {slow}")
