"""The step that measures what quantizing each channel to each width does to the action."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qvla_export.pipeline.calibrate import load_calibration, require_calibration
from qvla_export.pipeline.plan import load_sensitivities
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.quantizer.quantize import compensated_spec, scale_form, spec_for
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.resources import Demand, Resources
    from qvla_export.policies.base import Policy
    from qvla_export.policies.layers import Layers
    from qvla_export.sensitivity.agreement import Agreement
    from qvla_export.sensitivity.estimators.base import Estimator, Question

Quantizer = Literal["nearest", "compensated"]


@dataclass(frozen=True)
class SensitivityRequest:
    """How sensitivities are measured."""

    # See `qvla_export.sensitivity.estimators.registry`.
    method: str = "first-order"
    # Of the plans that they are for: the nearest codes, or codes that make up for each other; None
    # for the latter where the method can say what they do.
    quantizer: Quantizer | None = None
    # Random probes an observation; None takes the whole Jacobian.
    probes: int | None = 4
    # Of all channels: measured exactly by two-stage.
    exact_share: float = 0.02
    seed: int = 0
    # Whether each step of a flow is looked at by itself, instead of the action that they make.
    per_step: bool = False
    # Whether layers that stay in 16 bits are measured too, for the report.
    kept_too: bool = False

    def __post_init__(self) -> None:
        if self.quantizer == "compensated" and self.method != "first-order":
            raise QvlaError(
                f"sensitivities of compensated codes are of first order, got --method {self.method}"
            )

    @property
    def codes(self) -> Quantizer:
        """Return the quantizer: compensated by default where the method is of first order."""
        return self.quantizer or ("compensated" if self.method == "first-order" else "nearest")

    def estimator(self, max_bytes: int | None = None) -> "Estimator":
        """Return what measures so, within a bound of memory.

        Raises:
            QvlaError: there is no such method, or an option is out of range.
        """
        from qvla_export.sensitivity.estimators.registry import Options, find_estimator

        return find_estimator(self.method, Options(self.probes, self.exact_share, max_bytes))


def sensitivities(
    run: RunFolder,
    policy: "Policy",
    target: Target,
    request: SensitivityRequest | None = None,
    resources: "Resources | None" = None,
    on_progress: OnProgress = ignore,
) -> Sensitivities:
    """Estimate all channels and widths, or keep what was estimated in the same way.

    Processes of one world share the observations; process 0 writes.

    Raises:
        QvlaError: there is no calibration set, or the method does not fit it.
    """
    from qvla_export.pipeline.resources import Resources
    from qvla_export.sensitivity.estimators.base import Work, remove_progress

    request, means = request or SensitivityRequest(), resources or Resources()
    estimator = request.estimator(means.max_bytes)
    question = new_question(run, policy, target, request.seed, means.batch_size)
    if request.codes == "compensated":
        question = compensated_question(run, question, target, means, on_progress)
    if request.per_step:
        question = replace(question, policy=policy.step_by_step(), per_step=True)
    # A journal of its own: its sums have the same shapes.
    ending = ".steps.progress" if request.per_step else ".progress"
    journal = run.sensitivities.with_suffix(ending)
    measured = load_if_current(
        run.sensitivities, Sensitivities.load, lambda old: _answers(old, question, estimator)
    )
    # Process 0 decides, so that none waits for one that has nothing to do.
    current = means.world.broadcast(measured is not None)
    work = f"sensitivities, {estimator.method}"
    if not current:
        record = _work(run, request, question, target)
        with recorded_work(record, on_progress, means.world) as hear:
            measured = estimator.table(question, Work(journal, bar(hear, work), means.world))
            if request.per_step:
                measured = replace(measured, settings={**measured.settings, "per_step": True})
            if means.world.rank == 0:
                measured.save(run.sensitivities)
    if means.world.rank == 0:
        remove_progress(journal)
    finish(on_progress, work, current)
    return measured or Sensitivities.load(run.sensitivities)


def _work(
    run: RunFolder, request: SensitivityRequest, question: "Question", target: Target
) -> ArtifactWork:
    options: dict[str, Value] = {
        "--policy": short(question.policy.digest),
        "calibration set": short(question.calibration_digest),
        "--target": target.name,
        "--zero-points": any(rule.zero_points for rule in question.quantizer.rules.values()),
        "--scales": scale_form(question.quantizer),
        "--quantizer": request.codes,
        "--method": request.method,
        "--probes": request.probes,
        "--seed": request.seed,
    }
    if request.method == "two-stage":
        options["--exact-share"] = request.exact_share
    if request.per_step:
        options["--per-step"] = True
    sources = [run.calibration, *([run.moments] if question.moments is not None else [])]
    return ArtifactWork(run, run.sensitivities, options, tuple(sources))


def open_and_measure(
    run: RunFolder,
    source: "PolicySource",
    target: Target,
    request: SensitivityRequest,
    resources: "Resources",
    check_pairs: int | None = 0,
    on_progress: OnProgress = ignore,
) -> "tuple[Sensitivities, Agreement | None]":
    """Open a checkpoint within the bound of memory and measure its sensitivities.

    With `check_pairs` also compare so many of them with exact ones.
    """
    from qvla_export.pipeline.resources import open_within
    from qvla_export.sensitivity.estimators.registry import STREAMED

    request.estimator(resources.max_bytes)  # says what is wrong before much is read
    streams = request.method in STREAMED and not check_pairs
    demand = first_order_demand(target, request.codes == "compensated") if streams else None
    opened = open_within(resources, source, demand)
    within = replace(resources, max_bytes=opened.max_bytes)
    measured = sensitivities(run, opened.policy, target, request, within, on_progress)
    if request.kept_too and not resources.world.rank:
        from qvla_export.pipeline.deployment.kept_layers import kept_layers

        kept_layers(run, opened.policy, target, on_progress)
    if not check_pairs or resources.world.rank:
        return measured, None
    return measured, agreement(run, opened.policy, check_pairs, request.seed, on_progress)


def new_question(
    run: RunFolder, policy: "Policy", target: Target, seed: int, batch_size: int = 8
) -> "Question":
    """Return what estimators are asked about a run: its calibration set, the target's quantizer."""
    from qvla_export.sensitivity.estimators.base import Question

    calibration = load_calibration(run)
    return Question(
        policy,
        calibration.observations,
        calibration.digest,
        spec_for(target),
        episode_lengths=calibration.episode_lengths,
        seed=seed,
        batch_size=batch_size,
    )


def compensated_question(
    run: RunFolder,
    question: "Question",
    target: Target,
    resources: "Resources | None" = None,
    on_progress: OnProgress = ignore,
) -> "Question":
    """Return a question about the compensating quantizer instead of the nearest codes.

    Of a policy whose weights were left on disk, moments are measured on the way, used and dropped,
    unless the run has them.
    """
    from qvla_export.measurement.moment_bounds import MomentSettings
    from qvla_export.pipeline.moments import moments
    from qvla_export.policies.layers import weights_on_disk

    if weights_on_disk(question.policy) and not run.moments.is_file():
        spec = compensated_spec(target)
        return replace(question, quantizer=spec, span_moments=MomentSettings())
    fed = moments(run, question.policy, resources, on_progress=on_progress)
    return replace(question, quantizer=compensated_spec(target), moments=fed)


def agreement(
    run: RunFolder,
    policy: "Policy",
    pairs: int | None,
    seed: int = 0,
    on_progress: OnProgress = ignore,
) -> "Agreement":
    """Compare the sensitivities with exact ones on sampled channels and widths.

    Args:
        run: has sensitivities of this policy.
        policy: in memory.
        pairs: (channel, width) pairs; None for as many as take about a minute of CPU time,
            at most 500.
        seed: draws them.
        on_progress: hears of every pair.

    Raises:
        QvlaError: sensitivities are missing, or of another policy or calibration set.
    """
    from qvla_export.pipeline.moments import moments
    from qvla_export.sensitivity.agreement import (
        Agreement,
        compare_with_exact,
        pairs_in_a_minute,
    )

    work, measured = "agreement with exact", load_sensitivities(run, policy.digest)
    count = None if pairs is None else min(pairs, _pairs_in_all(measured))
    compared = load_if_current(
        run.agreement,
        Agreement.load,
        lambda old: (
            (old.sensitivities_digest, old.seed) == (measured.digest, seed)
            and count in (None, len(old.pairs))
        ),
    )
    if compared is not None:
        finish(on_progress, work, kept=True)
        return compared
    # The very table that plans are made of is judged, with the codes it is of.
    fed = moments(run, policy) if measured.quantizer.needs_moments else None
    if measured.settings.get("per_step"):
        policy = policy.step_by_step()
    calibration = load_calibration(run)
    require_calibration(calibration, measured.calibration_digest, "sensitivities")
    observations = calibration.observations
    options: dict[str, Value] = {
        "sensitivities": short(measured.digest),
        "--check-pairs": pairs or "a minute's",
        "--seed": seed,
    }
    record = ArtifactWork(run, run.agreement, options, (run.sensitivities,))
    with recorded_work(record, on_progress) as hear:
        if pairs is None:
            pairs = pairs_in_a_minute(measured, policy, observations, seed, fed)
        shown = bar(hear, work)
        compared = compare_with_exact(measured, policy, observations, pairs, seed, fed, shown)
        compared.save(run.agreement)
    finish(on_progress, work, kept=False)
    return compared


def _answers(measured: Sensitivities, question: "Question", estimator: "Estimator") -> bool:
    """Whether sensitivities are what an estimator would answer."""
    # Files written before settings were recorded: first order with so many probes. Later ones name
    # a bound that is gone; null bounded nothing. Exact ones have none.
    stored = dict(measured.settings)
    if not stored and "probes" in estimator.settings:
        stored = {"probes": measured.probes or None}
    now = {**estimator.settings, **({"per_step": True} if question.per_step else {})}
    now |= question.stated_shares
    return (
        measured.policy_digest,
        measured.calibration_digest,
        measured.quantizer,
        measured.widths,
        measured.seed,
        measured.method,
    ) == (
        question.policy.digest,
        question.calibration_digest,
        question.quantizer,
        question.widths,
        question.seed,
        estimator.method,
    ) and stored in (now, {**now, "max_standard_error": None})


def first_order_demand(target: Target, compensated: bool) -> "Demand":
    """Return what measuring to first order takes of memory, with the moments that it may need."""
    from qvla_export.measurement.standard_error import empty_sums
    from qvla_export.measurement.weight_errors import error_needs
    from qvla_export.pipeline.moments import moment_demand
    from qvla_export.pipeline.resources import Demand
    from qvla_export.sensitivity.estimators.base import Question

    spec = compensated_spec(target) if compensated else spec_for(target)

    def held_of(layers: "Layers") -> int:
        channels = {name: len(layer.weight) for name, layer in layers.items()}
        sums = sum(array.nbytes for array in empty_sums(channels, len(Question.widths)).values())
        return max(sums, moment_demand().held_of(layers)) if compensated else sums

    return Demand(error_needs(spec, Question.widths), held_of)


def _pairs_in_all(measured: Sensitivities) -> int:
    channels = sum(int(values.shape[1]) for values in measured.values.values())
    return len(measured.widths) * channels
