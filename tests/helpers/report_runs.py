"""A run folder with all that a report shows."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from tiny_bundles import make_bundle

from calibration.benchmarks.rollouts import EpisodeResult, Evaluation, RolloutConfig
from engines.targets import CPU
from jetson.board import read_board_state
from jetson.latency.comparison import compare_profiles
from jetson.latency.profile import LatencyProfile
from qvla_export.allocation.allocate import Budget, allocate_bits
from qvla_export.pipeline.recommend.bounds import form_bounds
from qvla_export.pipeline.recommend.next_commands import next_commands
from qvla_export.pipeline.recommend.open_loop import Actions, open_loop_error
from qvla_export.pipeline.recommend.recommendation import Candidate, Recommendation, choose
from qvla_export.pipeline.recommend.sentences import choice_sentences
from qvla_export.pipeline.recommend.tolerance import USUAL_TOLERANCE
from qvla_export.pipeline.recommend.traces import traces
from qvla_export.policies.layers import layer_shapes, traced_layers
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.sensitivity.agreement import Agreement
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.action_space import ActionLabels, action_space
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.latency_statistics import Deadline
from qvla_export.shared.observation import Observation

SETTINGS = ("float", "w8", "w4", "w4-rtn")
TASKS = ("drawer-open", "drawer-close")
EPISODES = 5
NAMES = ("x", "y", "z", "gripper")


def make_report_run(policy: OftPolicy, seen: list[Observation], run: Path) -> Path:
    """Write a run folder of a policy: real plans and bundles, invented measurements."""
    settings = FirstOrder(quantizer=spec_for(CPU), probes=2)
    measured = measure_first_order(policy, seen, "calibration-digest", settings)
    run.mkdir()
    measured.save(run / "sensitivities.safetensors")
    kept = FirstOrder(spec_for(CPU), (2, 4, 8), probes=2, of_kept=True)
    found = measure_first_order(policy, seen, "calibration-digest", kept)
    found.save(run / "kept_layers.safetensors")
    shapes = layer_shapes(traced_layers(policy))
    plans = {
        "float": None,
        "w8": allocate_bits(measured, Budget("bits per channel", 8.0), CPU),
        "w4": allocate_bits(measured, Budget("bits per channel", 4.0), CPU),
        "w4-rtn": uniform_plan(shapes, 4, CPU, policy.digest),
    }
    bundles = {}
    for name, plan in plans.items():
        folder = run / "settings" / name
        bundles[name] = make_bundle(policy, plan, seen[:1], folder / "bundle")
        _write_measurements(folder, bundles[name], plan)
    _write_run_wide(run, bundles, measured)
    return run


def _write_measurements(folder: Path, bundle: Bundle, plan: BitPlan | None) -> None:
    if plan is not None:
        plan.save(folder / "plan.json")
    rms = 3e-7 if plan is None else 0.0123 * 16 / plan.mean_bits_per_channel
    vector = [rms / 2, rms / 3, rms / 4, rms / 5]
    error = {
        "setting": folder.name,
        "bundle_digest": bundle.digest,
        "held_out": 7,
        "mse": rms**2 * 16,
        "rms": rms,
        "mean_abs_normalized": vector,
        "max_abs_normalized": vector,
        "mean_abs_physical": vector,
        "engine_drift_max": 8.7e-7,
        "cosine": 0.999,
    }
    write_json(folder / "action_error.json", error)
    _evaluation(folder.name, bundle.digest, "none").save(folder / "evaluation.json")


def _evaluation(name: str, digest: str, control: Any) -> Evaluation:
    results = tuple(
        EpisodeResult(task, seed, (seed + len(name)) % 3 > 0, 20, (0.1, 0.2, 0.05 * seed))
        for seed in range(EPISODES)
        for task in TASKS
    )
    return Evaluation(name, digest, RolloutConfig(TASKS, EPISODES, control=control), results, {})


def _write_run_wide(run: Path, bundles: dict[str, Bundle], measured: Sensitivities) -> None:
    write_json(
        run / "run.json",
        {
            "policy": "tiny",
            "policy_digest": measured.policy_digest,
            "target": "cpu",
            "command": "qvla deploy --policy tiny",
            "created": "2026-11-24T00:00:00+00:00",
            "versions": {"python": "3"},
            "machine": {"cores": 2},
            "settings": list(SETTINGS),
            "stages": {"agreement": True, "episodes": True, "latency": True},
        },
    )
    drawn = {"digest": measured.calibration_digest, "calibration": 2, "held_out": 7, "source": {}}
    write_json(run / "calibration" / "calibration.json", drawn)
    _write_recommendation(run, bundles, measured.calibration_digest)
    layer = next(iter(measured.values))
    Agreement(
        spearman=0.9876,
        spearman_by_width={"2": 0.98, "4": 0.97},
        samples=2,
        exact_pair_seconds=0.1,
        exact_all_seconds=100.0,
        first_order_seconds=1.0,
        policy_digest=measured.policy_digest,
        sensitivities_digest=measured.digest,
        pairs=[(layer, i, 2 + 2 * (i % 2), i * 1e-5, i * 1.1e-5) for i in range(12)],
    ).save(run / "agreement.json")
    board, generator = read_board_state(), np.random.default_rng(0)
    profiles = []
    for name in [*SETTINGS, "w4 served"]:
        engine = generator.gamma(30, 0.5, 40)
        samples = {"engine": engine, "decode": engine / 20, "total": engine * 1.05}
        digest = bundles[name].digest if name in bundles else ""
        profiles.append(
            LatencyProfile(
                name=name,
                samples_ms=samples,
                started_ms=np.arange(40.0),
                warmup=2,
                first_action_ms=9.0,
                load_ms=None,
                transport="http",
                bundle_digest=digest,
                target="cpu",
                horizon=8,
                versions={},
                board_before=board,
                board_after=board,
            )
        )
    compare_profiles(profiles, Deadline(60.0)).save(run / "latency.json")
    for control in ("blank-image", "wrong-instruction"):
        name = f"float, {control}"
        _evaluation(name, bundles["float"].digest, control).save(run / f"controls/{control}.json")


def _write_recommendation(run: Path, bundles: dict[str, Bundle], calibration_digest: str) -> None:
    """Recommend on invented actions of four numbers: the fewer bits, the noisier."""
    random = np.random.default_rng(5)
    space = action_space(4, np.ones(4, bool), (ActionLabels("the test", NAMES, 20.0),))
    target = np.cumsum(random.normal(0, 0.1, (7, 8, 4)), axis=1)
    own = target + random.normal(0, 0.05, target.shape)
    actions = Actions(own, target, np.ones(4))
    noises = {"float": 1e-6, "w8": 1e-4, "w4": 1e-3, "w4-rtn": 0.1}
    answers = {n: own + random.normal(0, sigma, own.shape) for n, sigma in noises.items()}
    candidates = tuple(
        Candidate(n, n == "float", bundles[n].digest, bundles[n].nbytes, error)
        for n, answer in answers.items()
        for error in (open_loop_error(space, actions, answer),)
    )
    float_error = open_loop_error(space, actions, own)
    bounds = form_bounds(space, float_error, USUAL_TOLERANCE, "")
    chosen = choose(candidates, bounds)
    assert chosen is not None and chosen.setting == "w4"
    found = Recommendation(
        "cpu",
        calibration_digest,
        space,
        float_error,
        bounds,
        candidates,
        chosen.setting,
        choice_sentences(chosen, candidates, bounds, "qvla deploy --policy tiny"),
        ("A doubt.",),
        next_commands(CPU, "w4", run / "settings/w4/bundle", native=True),
        traces(target, {"float policy": own, **answers}),
    )
    write_json(run / "recommendation.json", found.to_json())


def edit_json(path: Path, **changes: Any) -> None:
    """Change some fields of a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Outline(HTMLParser):
    """Collect the tags and attributes that a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
