"""What `qvla run` is put together from: the policy, the limits, the loop, the signals."""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.robot.control_options import RunOptions
from qvla_export.pipeline.robot.control_sources import open_source
from qvla_export.shared.action import ActionPolicy
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.motion.command_response import CommandResponse
from qvla_export.shared.normalization import Bounds

if TYPE_CHECKING:
    from jetson.control.loop import ControlLoop
    from jetson.control.records import Recorder, RunResult
    from jetson.control.safety import ActionSafety
    from jetson.control.settings import LoopSettings
    from jetson.live.loop_page import LoopWatch
    from jetson.serving.policy_contract import PolicyContract

_LOG = logging.getLogger(__name__)
# What stands for NaN in a vector: hold positions and grippers by repeating the last command.
_WORDS = {"last": np.nan, "hold": np.nan}
# Of --roll-forward: the action is what the state's number shall be, or says nothing of it.
_EFFECTS = {"position": np.nan, "stays": 0.0}
# Of --seam-limit: a gripper jumps.
_ANY = {"any": np.inf}
# The simulator's actions are displacements of the hand and an opening of the gripper.
_SIMULATOR_HOLD = "0,0,0,last"


def run_policy(
    options: RunOptions, policy: ActionPolicy | None = None, wait: Callable[[], None] | None = None
) -> "RunResult":
    """Open everything, warm the policy up, run until the end, close everything.

    Args:
        options: as on the command line.
        policy: instead of opening `options.policy`.
        wait: called when the loop is about to start.

    Raises:
        QvlaError: an option is wrong, or the policy, the source or the robot cannot be opened.
    """
    from jetson.control.inference import InlineInference, ThreadedInference
    from jetson.control.loop import ControlLoop
    from jetson.control.loop_clock import MonotonicClock, SimulatedClock
    from jetson.guarded_policy import guarded
    from jetson.remembering_policy import RememberingPolicy
    from jetson.serving.policy_contract import contract_of

    clock = SimulatedClock() if options.simulated_time else MonotonicClock()
    with ExitStack() as stack:
        if policy is None:
            policy = _open_policy(options, stack)
        contract = contract_of(policy)
        safety = _safety(options, policy, contract)
        settings = _settings(options, contract)
        source, sink = open_source(options, contract, clock, stack)
        recorder: Recorder | None = None
        if options.record is not None:
            recorder = stack.enter_context(closing(_recorder(options.record, contract)))
        watch = None
        if options.live is not None:
            recorder = watch = _live_page(options.live, recorder, contract, safety, stack)
        # The first inference of an engine is slow, and nobody waits for it yet.
        policy.infer(contract.blank_observation())
        make = InlineInference if options.simulated_time else ThreadedInference
        inference = make(RememberingPolicy(guarded(policy)), clock)
        loop = ControlLoop(source, inference, sink, safety, settings, clock, recorder)
        if watch is not None:
            watch.counters = loop.counters
        if wait is not None:
            wait()
        with _signals_to(loop):
            result = loop.run(options.seconds)
        return replace(result, solved=getattr(source, "solved", None))


def _live_page(
    address: str,
    recorder: "Recorder | None",
    contract: "PolicyContract",
    safety: "ActionSafety",
    stack: ExitStack,
) -> "LoopWatch":
    """Serve the page until the stack closes; return what the loop must tell."""
    from jetson.live.loop_page import LoopWatch, live_page
    from jetson.serving.security import read_token

    watch = LoopWatch(recorder)
    url = stack.enter_context(live_page(watch, contract, safety, address, read_token()))
    _LOG.info("live page: %s", url)
    return watch


def _recorder(path: Path, contract: "PolicyContract") -> "Recorder":
    """Return what keeps the run, by the file's name."""
    if path.suffix == ".mcap":
        from jetson.board import read_board_state
        from jetson.recording.writer import McapRecorder

        return McapRecorder(path, contract, read_board_state, "run")
    from jetson.control.records import JsonlRecorder

    return JsonlRecorder(path)


def parse_vector(
    text: str, size: int, what: str, words: Mapping[str, float] = _WORDS
) -> NDArray[np.float32]:
    """Return the numbers of a comma-separated option; one number stands for all dimensions.

    Args:
        text: the option's value.
        size: dimensions.
        what: the option's name.
        words: what else an entry may be, and the number it becomes; by default `last` and `hold`,
            which become NaN.

    Raises:
        QvlaError: an entry is no number, or there are neither 1 nor `size` of them.
    """
    entries = [entry.strip() for entry in text.split(",")]
    try:
        numbers = [words[e] if e in words else float(e) for e in entries]
    except ValueError:
        raise QvlaError(f"{what} takes {' or '.join(('numbers', *words))}, got {text!r}") from None
    if len(numbers) not in (1, size):
        raise QvlaError(f"{what} takes 1 or {size} entries for this policy, got {len(numbers)}")
    return np.asarray(numbers * (size if len(numbers) == 1 else 1), np.float32)


def _open_policy(options: RunOptions, stack: ExitStack) -> ActionPolicy:
    policy = PolicySource(options.policy, threads=options.threads, weights=options.weights)()
    engine = getattr(policy, "engine", policy)
    if isinstance(engine, AbstractContextManager):
        stack.enter_context(engine)
    return policy


def _settings(options: RunOptions, contract: "PolicyContract") -> "LoopSettings":
    from jetson.control.settings import LoopSettings

    if not options.rate_hz > 0:
        raise QvlaError(f"--rate-hz must be above 0, got {options.rate_hz}")
    response = _response(options, contract)
    # A chunk says nothing about later moments; it is first obeyed a slot after it was asked for.
    span_ms = options.max_action_age_ms or 1000.0 * (contract.horizon + 1) / options.rate_hz
    # Where its beginning is foreseen, that may be a chunk later.
    ahead_ms = 1000.0 * contract.horizon / options.rate_hz if response else 0.0
    return LoopSettings(
        rate_hz=options.rate_hz,
        max_action_age_ms=options.max_action_age_ms or span_ms + ahead_ms,
        max_observation_age_ms=options.max_observation_age_ms or span_ms / 2,
        mode=options.mode,
        execute=options.execute or contract.horizon,
        ensemble_decay=options.ensemble_decay,
        hold_ms=options.hold_ms,
        ramp_ms=options.ramp_ms,
        give_up_s=options.give_up_s,
        response=response,
        seam_limit=None
        if options.seam_limit is None
        else parse_vector(options.seam_limit, contract.action_dim, "--seam-limit", _ANY),
    )


def _response(options: RunOptions, contract: "PolicyContract") -> CommandResponse | None:
    """Return how commands move the state, where the policy is to be shown a state ahead."""
    if options.roll_forward is None:
        return None
    if not contract.state_dim:
        raise QvlaError(
            "--roll-forward moves a state, and the policy takes none; leave the option out"
        )
    effects = parse_vector(options.roll_forward, contract.action_dim, "--roll-forward", _EFFECTS)
    # What an action says beyond the state's numbers must be said to move none of them.
    if effects[contract.state_dim :].any():
        raise QvlaError(
            f"--roll-forward says what each of {contract.action_dim} numbers of an action does to "
            f"the state's number at its place, and the state has {contract.state_dim}; say stays "
            f"for those beyond, got {options.roll_forward!r}"
        )
    shares = parse_vector(options.response, options.response.count(",") + 1, "--response", {})
    moved = effects[: contract.state_dim].astype(np.float64)
    return CommandResponse(moved, shares.astype(np.float64))


def _safety(
    options: RunOptions, policy: ActionPolicy, contract: "PolicyContract"
) -> "ActionSafety":
    from jetson.control.safety import action_safety

    size = contract.action_dim
    hold = options.hold
    if hold is None and options.source_kind == "simulator":
        hold = _SIMULATOR_HOLD
    if hold is None:
        raise QvlaError(
            "say what holds this robot still: --hold 0,0,0,0,0,0,last for displacements and a "
            "gripper, --hold last for joint positions; a wrong guess would move it"
        )
    return action_safety(
        _limits(options, policy, size),
        parse_vector(hold, size, "--hold"),
        None if options.safe is None else parse_vector(options.safe, size, "--safe"),
        None if options.max_step is None else parse_vector(options.max_step, size, "--max-step"),
    )


def _limits(options: RunOptions, policy: ActionPolicy, size: int) -> Bounds:
    """Return the limits asked for, or those of the data the policy was trained on."""
    if options.limits is not None:
        pairs = [pair.partition(":") for pair in options.limits.split(",")]
        low = parse_vector(",".join(p[0] for p in pairs), size, "--limits").astype(np.float64)
        high = parse_vector(",".join(p[2] for p in pairs), size, "--limits").astype(np.float64)
        return Bounds(low, high, np.ones(size, bool))
    bundle = getattr(policy, "bundle", None)
    processor = getattr(bundle if bundle is not None else policy, "processor", None)
    if processor is None:
        raise QvlaError(
            f"{options.policy} does not say its action limits; give them as --limits LOW:HIGH, "
            "one pair or one a dimension (--limits=-1:1)"
        )
    limits: Bounds | None = processor.command_limits
    if limits is None:
        raise QvlaError(
            f"actions of {options.policy} are differences to the state, so its statistics limit no "
            "command; give the robot's own as --limits LOW:HIGH, one pair or one a dimension"
        )
    return limits


@contextlib.contextmanager
def _signals_to(loop: "ControlLoop") -> Iterator[None]:
    """Let SIGINT and SIGTERM ask for the end; the loop then leaves the robot safe."""

    def stop(number: int, frame: object) -> None:
        loop.stop(f"asked by {signal.Signals(number).name}")

    previous = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
