"""`qvla run`: a policy on a robot."""

from typing import TYPE_CHECKING

import typer

from qvla_export.cli.options import (
    JsonOption,
    SeedOption,
    ThreadsOption,
    WeightsOption,
    with_columns,
)
from qvla_export.cli.progress import print_json
from qvla_export.cli.robot.run_options import (
    CommandJointsOption,
    CommandsOption,
    EnsembleDecayOption,
    ExecuteOption,
    GiveUpOption,
    HoldMsOption,
    HoldOption,
    InstructionOption,
    JointsOption,
    LimitsOption,
    LiveOption,
    MaxActionAgeOption,
    MaxObservationAgeOption,
    MaxStepOption,
    ModeOption,
    RampMsOption,
    RateOption,
    RecordOption,
    ResponseOption,
    RollForwardOption,
    RunPolicyArgument,
    SafeOption,
    SeamLimitOption,
    SecondsOption,
    SimulatedTimeOption,
    SourceOption,
)
from qvla_export.pipeline.data_source import USUAL_COLUMNS, ColumnOptions
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.control.records import RunResult


@with_columns
def run(
    policy: RunPolicyArgument,
    source: SourceOption,
    rate_hz: RateOption,
    mode: ModeOption = "receding",
    execute: ExecuteOption = None,
    ensemble_decay: EnsembleDecayOption = 0.01,
    roll_forward: RollForwardOption = None,
    response: ResponseOption = "1",
    instruction: InstructionOption = None,
    hold: HoldOption = None,
    safe: SafeOption = None,
    limits: LimitsOption = None,
    max_step: MaxStepOption = None,
    seam_limit: SeamLimitOption = None,
    max_action_age_ms: MaxActionAgeOption = None,
    max_observation_age_ms: MaxObservationAgeOption = None,
    hold_ms: HoldMsOption = 500.0,
    ramp_ms: RampMsOption = 1000.0,
    give_up_s: GiveUpOption = 10.0,
    commands: CommandsOption = "none",
    record: RecordOption = None,
    live: LiveOption = None,
    seconds: SecondsOption = None,
    simulated_time: SimulatedTimeOption = False,
    seed: SeedOption = 1_000_000,
    columns: ColumnOptions = USUAL_COLUMNS,
    joints: JointsOption = "",
    command_joints: CommandJointsOption = "",
    threads: ThreadsOption = None,
    weights: WeightsOption = "tuned",
    as_json: JsonOption = False,
) -> None:
    """Run a policy closed loop, on time: safe commands out, whatever is late or broken.

    Exits with 0 after a clean stop (end of the source, --seconds, SIGINT, SIGTERM) and with 2
    after faults. The last command is always the safe action. With the simulator it says whether
    the task was solved.
    """
    options = {name: value for name, value in locals().items() if name != "as_json"}
    if as_json and commands == "stdout":
        raise QvlaError("--json and --commands stdout both write to stdout; leave one out")
    from qvla_export.pipeline.robot.control_loop import run_policy
    from qvla_export.pipeline.robot.control_options import RunOptions

    result = run_policy(RunOptions(**options))
    # Not on stdout where the commands are, or the one document.
    typer.echo(_summary(result), err=as_json or commands == "stdout")
    if as_json:
        print_json(result.to_json())
    if not result.ok:
        raise typer.Exit(2)


def _summary(result: "RunResult") -> str:
    counts = ", ".join(f"{name} {count}" for name, count in result.counters.items())
    solved = {None: "", True: "; task solved", False: "; task not solved"}[result.solved]
    ended = f"run: {result.state.value} after {result.seconds:.1f} s, {result.reason}"
    return f"{ended}{solved}; {counts}"
