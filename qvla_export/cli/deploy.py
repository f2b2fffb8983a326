"""`qvla deploy`: every stage in order, from a checkpoint to a report."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.allocation.setting import Setting, parse_setting
from qvla_export.cli.options import (
    CamerasOption,
    DatasetOption,
    PresetOption,
    SeedOption,
    StateColumnOption,
    TargetOption,
    UnnormKeyOption,
    WorkersOption,
    ZeroPointsOption,
    open_checkpoint,
    open_dataset,
)
from qvla_export.cli.sensitivities import QuantizerOption
from qvla_export.cli.simulator import TasksOption, chosen_tasks
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.artifacts import read_json, versions, write_json
from qvla_export.shared.errors import InvalidObservation

if TYPE_CHECKING:
    from calibration.sources.lerobot import LeRobotDataset
    from qvla_export.policies.base import Policy


@dataclass(frozen=True)
class Deployment:
    """What `qvla deploy` was asked for."""

    run: RunFolder
    source: PolicySource
    target: str
    settings: tuple[Setting, ...]
    dataset: "LeRobotDataset | None"
    tasks: tuple[str, ...]
    # Observations to measure on and to judge by.
    count: int
    held_out: int
    # Simulated episodes of each task and setting; 0 for none.
    episodes: int
    check_pairs: int
    samples: int
    threads: int | None
    seed: int
    workers: int
    # Codes of planned settings: "nearest" or "compensated".
    quantizer: str
    # Whether they have zero points.
    zero_points: bool = False


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(deploy)


def deploy(
    policy: Annotated[Path, typer.Option(help="Checkpoint folder.")] = Path(
        "checkpoints/reference"
    ),
    run: Annotated[Path, typer.Option(help="Run folder; an existing one continues.")] = Path(
        "runs/demo"
    ),
    target: TargetOption = "cpu",
    settings: Annotated[
        str, typer.Option(help="Comma-separated: float, w<mean bits>, w<bits>-rtn.")
    ] = "float,w8,w8a8,w4,w4-rtn,w2,w2-rtn",
    dataset: DatasetOption = None,
    cameras: CamerasOption = None,
    state_column: StateColumnOption = "observation.state",
    tasks: TasksOption = None,
    count: Annotated[int, typer.Option(help="Observations to measure on.")] = 64,
    held_out: Annotated[int, typer.Option(help="Observations to judge by.")] = 64,
    episodes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Simulated episodes of each task and setting; default 20, with --dataset 0.",
        ),
    ] = None,
    check_pairs: Annotated[
        int,
        typer.Option(min=0, help="(channel, width) pairs compared with exact measurement."),
    ] = 500,
    samples: Annotated[int, typer.Option(min=1, help="Actions of each latency profile.")] = 200,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of each engine in the latency profile.")
    ] = 1,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    seed: SeedOption = 0,
    workers: WorkersOption = 2,
    quantizer: QuantizerOption = "compensated",
    zero_points: ZeroPointsOption = False,
) -> None:
    """Run every stage: calibration, sensitivities, plans, bundles, judgement, latency, report."""
    from engines.targets import find_target

    device = find_target(target, zero_points)
    wanted = Deployment(
        run=RunFolder(run),
        source=PolicySource(str(policy), unnorm_key, preset, threads=1),
        target=target,
        settings=tuple(parse_setting(name.strip(), device) for name in settings.split(",")),
        dataset=open_dataset(dataset, cameras, state_column),
        tasks=chosen_tasks(tasks) if dataset is None or episodes else (),
        count=count,
        held_out=held_out,
        episodes=(20 if dataset is None else 0) if episodes is None else episodes,
        check_pairs=check_pairs,
        samples=samples,
        threads=threads,
        seed=seed,
        workers=workers,
        quantizer=quantizer,
        zero_points=zero_points,
    )
    run_all(wanted, open_checkpoint(policy, unnorm_key, preset))


def run_all(wanted: Deployment, policy: "Policy") -> None:
    """Run every stage; what is up to date is kept."""
    from engines.check.bundle import check_bundle
    from engines.check.finding import require_no_errors
    from engines.load import runtime_here
    from engines.targets import find_target
    from engines.trt.sidecar import engine_folder
    from qvla_export.cli.build import build_with_progress
    from qvla_export.pipeline import evaluate as judging
    from qvla_export.pipeline import export as exporting
    from qvla_export.pipeline import moments as compensating
    from qvla_export.pipeline import plan as stages
    from qvla_export.report.run_data import estimators_of
    from qvla_export.sensitivity.estimators.first_order import FirstOrderEstimator

    run, target = wanted.run, find_target(wanted.target)
    _check_inputs(wanted, policy)
    _say("calibration")
    stages.calibrate(run, wanted.dataset, wanted.tasks, wanted.count, wanted.held_out, wanted.seed)
    _describe(wanted, policy)
    _say("sensitivities of every channel and width")
    compensated = wanted.quantizer == "compensated"
    how = (find_target(wanted.target, wanted.zero_points), FirstOrderEstimator(), wanted.seed)
    measured = stages.sensitivities(run, policy, *how, compensated=compensated)
    estimators_of(run.root, measured)  # what the report would refuse at the end
    if wanted.check_pairs:
        compared = stages.agreement(run, policy, wanted.check_pairs, wanted.seed)
        _say(
            f"Spearman {compared.spearman:.4f} with exact, at {compared.time_ratio:.4f} of its time"
        )
    if any(setting.activation_bits for setting in wanted.settings):
        _say("activations of every layer")
        stages.activations(run, policy)
    native = runtime_here(target) == target.runtime
    for setting in wanted.settings:
        _say(f"{setting.name}: plan, bundle, engine")
        stages.plan(run, setting, target, policy.digest)
        compensating.rounded(run, setting, policy)
        bundle = exporting.export(run, setting, policy, target)
        require_no_errors(check_bundle(bundle, target))
        if target.runtime == "tensorrt_rtx" or (native and target.runtime == "tensorrt"):
            build_with_progress(bundle, engine_folder(bundle))
        judging.action_error(run, setting, policy)
    if native:
        _say("latency, in process and served over HTTP")
        judging.latency(run, wanted.settings, wanted.samples, wanted.threads)
    else:
        _say(
            f"this machine cannot run engines for {target.name}: its graphs are judged on ONNX "
            "Runtime, latency is not measured; on the device: qvla verify BUNDLE --latency"
        )
    if wanted.episodes:
        _run_episodes(wanted)
    from qvla_export.report.page import write_report

    page = write_report(run.root)
    Console().print(_table(run, wanted.settings))
    served = run.bundle(wanted.settings[-1]).parent.parent
    _say(f"report: {page}")
    _say(f"serve one: qvla serve {served}/<setting>/bundle")


def _check_inputs(wanted: Deployment, policy: "Policy") -> None:
    """Refuse data and simulator that do not fit the policy, before the first stage."""
    from calibration.benchmarks.metaworld.simulator import Simulator
    from calibration.benchmarks.metaworld.tasks import find_task

    if wanted.dataset is not None:
        try:
            policy.processor.feeds(wanted.dataset[0].observation)
        except InvalidObservation as error:
            raise InvalidObservation(
                f"{wanted.dataset.root}: {error}; name the data set's columns with "
                "--camera NAME=COLUMN and --state-column"
            ) from error
    if wanted.dataset is None or wanted.episodes:
        with Simulator(find_task(wanted.tasks[0])) as simulator:
            observation = simulator.reset(0)
        try:
            policy.processor.feeds(observation)
        except InvalidObservation as error:
            raise InvalidObservation(
                f"the simulator does not fit this policy: {error}; use --dataset and --episodes 0"
            ) from error


def _run_episodes(wanted: Deployment) -> None:
    from calibration.benchmarks.evaluation import CONTROLS, RolloutConfig
    from qvla_export.pipeline import evaluate as judging

    base = RolloutConfig(wanted.tasks, wanted.episodes)
    for setting in wanted.settings:
        judging.rollouts(wanted.run, setting, base, wanted.source, wanted.workers)
    floats = [setting for setting in wanted.settings if setting.kind == "float"]
    first = [*floats, *wanted.settings][0]
    for control in CONTROLS[1:]:
        config = RolloutConfig(wanted.tasks, wanted.episodes, control=control)
        judging.rollouts(wanted.run, first, config, wanted.source, wanted.workers)


def _describe(wanted: Deployment, policy: "Policy") -> None:
    from jetson.board import read_board_state

    board = read_board_state()
    write_json(
        wanted.run.description,
        {
            "policy": Path(wanted.source.place).name,
            "policy_digest": policy.digest,
            "target": wanted.target,
            "settings": [setting.name for setting in wanted.settings],
            "command": " ".join(["qvla", *sys.argv[1:]]),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": {"cpu_model": board.cpu_model, "cores": board.cores},
        },
    )


def _table(run: RunFolder, settings: Sequence[Setting]) -> Table:
    from qvla_export.shared.bundle import Bundle

    table = Table(title="float against quantized")
    for column in ("setting", "layers / FP16", "bundle", "action RMS", "success", "p50", "p99"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    latency = _latency_rows(run)
    for setting in settings:
        bundle = Bundle.load(run.bundle(setting))
        layers = sum(n for part, n in bundle.weight_bytes.items() if part != "rest")
        ratio = 1.0 if bundle.plan is None else layers / bundle.plan["float16_bytes"]
        error = read_json(run.action_error(setting), "action error")
        p50, p99 = latency.get(setting.name, ("not run", ""))
        table.add_row(
            setting.name,
            f"{ratio:.3f}",
            f"{bundle.nbytes / 1e6:.2f} MB",
            f"{error['rms']:.5f}",
            _success(run, setting),
            p50,
            p99,
        )
    return table


def _success(run: RunFolder, setting: Setting) -> str:
    path = run.evaluation(setting)
    if not path.is_file():
        return "not run"
    summary = read_json(path, "evaluation")["summary"]
    low, high = summary["wilson_95"]
    return f"{summary['success']:.1%} [{low:.1%}, {high:.1%}]"


def _latency_rows(run: RunFolder) -> dict[str, tuple[str, str]]:
    """Setting -> p50 and p99, or max of few, in words; empty where no latency was measured."""
    from jetson.latency.comparison import LatencyComparison
    from qvla_export.shared.latency_statistics import tail

    if not run.latency.is_file():
        return {}
    rows = {}
    for profile in LatencyComparison.load(run.latency).profiles:
        name, ms = tail(profile.samples_ms["total"])
        worst = f"{ms:.2f} ms" if name == "p99" else f"{name} {ms:.2f} ms"
        rows[profile.name] = (f"{profile.percentile_ms(50):.2f} ms", worst)
    return rows


def _say(text: str) -> None:
    Console().print(f"[bold]qvla[/bold] {text}", highlight=False)
