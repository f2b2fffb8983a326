"""The report: one page, self-contained, whose numbers are the artifacts' numbers."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundles import make_bundle

from calibration.rollouts import EpisodeResult, Evaluation, RolloutConfig
from engines.targets import CPU
from jetson.board import read_board_state
from jetson.latency import compare_profiles
from jetson.latency_profile import LatencyProfile
from qvla_export.agreement import Agreement
from qvla_export.allocation import Budget, allocate_bits
from qvla_export.artifacts import write_json
from qvla_export.bundle import Bundle
from qvla_export.errors import ArtifactError, ArtifactMismatch
from qvla_export.first_order import FirstOrder, measure_first_order
from qvla_export.latency_figures import Deadline
from qvla_export.layers import layer_shapes, traced_layers
from qvla_export.plan import BitPlan, uniform_plan
from qvla_export.policies.oft import OftPolicy
from qvla_export.quantize import spec_for
from qvla_export.report.layer_names import label_of, module_of
from qvla_export.report.page import write_report
from qvla_export.sensitivity import Sensitivities

SETTINGS = ("float", "w8", "w4", "w4-rtn")
TASKS = ("drawer-open", "drawer-close")
EPISODES = 5
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{1}{$'


@pytest.fixture(scope="module")
def pristine(
    tiny_policy: OftPolicy, tiny_observations: Callable[..., Any], tmp_path_factory: Any
) -> Path:
    """A run folder of the tiny policy: real plans and bundles, invented measurements."""
    run: Path = tmp_path_factory.mktemp("report") / "run"
    seen = tiny_observations(2)
    settings = FirstOrder(quantizer=spec_for(CPU), probes=2)
    measured = measure_first_order(tiny_policy, seen, "calibration-digest", settings)
    run.mkdir()
    measured.save(run / "sensitivities.safetensors")
    shapes = layer_shapes(traced_layers(tiny_policy))
    plans = {
        "float": None,
        "w8": allocate_bits(measured, Budget("bits per channel", 8.0), CPU),
        "w4": allocate_bits(measured, Budget("bits per channel", 4.0), CPU),
        "w4-rtn": uniform_plan(shapes, 4, CPU, tiny_policy.digest),
    }
    bundles = {}
    for name, plan in plans.items():
        folder = run / "settings" / name
        bundles[name] = make_bundle(tiny_policy, plan, seen[:1], folder / "bundle")
        _write_measurements(folder, bundles[name], plan)
    _write_run_wide(run, bundles, measured)
    return run


@pytest.fixture(scope="module")
def page(pristine: Path) -> str:
    """The page of the undamaged run."""
    return write_report(pristine).read_text()


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the run folder to damage."""
    ignored = shutil.ignore_patterns("report.html")
    return Path(shutil.copytree(pristine, tmp_path / "run", ignore=ignored))


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
        },
    )
    drawn = {"digest": measured.calibration_digest, "calibration": 2, "held_out": 7, "source": {}}
    write_json(run / "calibration" / "calibration.json", drawn)
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


class _Outline(HTMLParser):
    """Collect the tags and attributes that a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_is_self_contained_and_valid_enough(page: str) -> None:
    outline = _Outline(page)
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64"))
    assert not re.search(r"@import|url\((?!#)", page)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', page):
        assert reference in ids
    assert len(page) < 1_500_000


def test_every_setting_figure_and_section_is_there(page: str) -> None:
    for name in (*SETTINGS, "w4 served", "blank-image", "wrong-instruction", "qvla deploy"):
        assert name in page
    assert page.count("<figure") == 10  # four results, two + one sensitivities, shares, two plans
    assert page.count('role="img"') == page.count("<svg") == 10
    assert "Nothing on this page was run on a GPU" in page
    assert "Not in this run" not in page


def test_numbers_in_the_table_are_those_of_the_artifacts(pristine: Path, page: str) -> None:
    page = html.unescape(page).replace("\u00a0", " ")
    latency = json.loads((pristine / "latency.json").read_text())
    for index, name in enumerate(SETTINGS):
        folder = pristine / "settings" / name
        row = page[page.index(f"<span>{name}</span>") :].split("</tr>")[0]
        error = json.loads((folder / "action_error.json").read_text())
        assert f"{error['rms']:.3g} RMS" in row and "engine drift 8.7e-07" in row
        done = json.loads((folder / "evaluation.json").read_text())["summary"]
        low, high = done["wilson_95"]
        assert f"{100 * done['success']:.1f} %" in row
        assert f"[{100 * low:.1f}, {100 * high:.1f}], n {done['episodes']}" in row
        total = latency["profiles"][index]["summary_ms"]["total"]
        assert f"{total['p50']:.2f} ms" in row and f"max {total['max']:.2f} ms" in row
        assert total["p99"] is None and "max of 40" in page  # 40 samples have no p99
        late = latency["profiles"][index]["misses"]
        assert f"{late['count']} ({100 * late['share']:.1f} %)" in page
        manifest = json.loads((folder / "bundle/manifest.json").read_text())
        layers = sum(n for part, n in manifest["weight_bytes"].items() if part != "rest")
        assert f"{layers:,} bytes" in row
        if name != "float":
            plan = BitPlan.load(folder / "plan.json")
            assert f"{plan.mean_bits_per_channel:.2f} per channel" in row
            assert f"{100 * layers / plan.float16_bytes:.1f} % of FP16" in row
            ratio = next(r for r in latency["ratios"] if (r["name"], r["stage"]) == (name, "total"))
            assert f"{ratio['ratio']:.2f}×" in row
            assert f"[{ratio['low']:.2f}, {ratio['high']:.2f}]" in row


def test_summary_sentence_is_computed(page: str) -> None:
    sentence = re.search(r'<p class="lead">(.*?)</p>', page.replace("\u00a0", " "))
    assert sentence is not None
    assert "mean bits per channel (w4)" in sentence[1]
    assert "of 10 episodes (float:" in sentence[1]
    assert "that of round-to-nearest (w4-rtn)" in sentence[1]


def test_equal_runs_give_equal_bytes(pristine: Path, page: str) -> None:
    assert write_report(pristine).read_text() == page


def test_hostile_names_stay_text(run: Path) -> None:
    _edit(run / "run.json", policy=HOSTILE, command=HOSTILE, machine={HOSTILE: HOSTILE})
    _rename_setting(run, "w4", HOSTILE.replace("/", ""))
    _rename_tasks(run / "settings/float/evaluation.json", HOSTILE)
    written = write_report(run).read_text()
    tags = _Outline(written).tags
    assert not any(tag in ("script", "img") for tag, _ in tags)
    assert "&lt;script&gt;" in written


def test_missing_pieces_are_named_with_their_command(run: Path) -> None:
    shutil.rmtree(run / "controls")
    for name in ("agreement.json", "latency.json"):
        (run / name).unlink()
    for name in SETTINGS:
        (run / "settings" / name / "evaluation.json").unlink()
        (run / "settings" / name / "action_error.json").unlink()
    (run / "calibration/calibration.json").unlink()
    written = html.unescape(write_report(run).read_text())
    for command in (
        f"qvla sensitivities --run {run} --policy <checkpoint> --check-pairs",
        f"qvla evaluate {run}/settings/w4/bundle --reference <checkpoint> --output",
        f"qvla evaluate {run}/settings/float/bundle --control wrong-instruction --output",
        f"qvla deploy --policy <checkpoint> --run {run}",
        f"qvla calibrate --run {run}",
    ):
        assert f"<code>{command}" in written
    assert written.count("<figure") == 5


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run.json", {"settings": []}),
        ("run.json", {"settings": ["../other"]}),
        ("run.json", {"machine": 3}),
        ("agreement.json", {"pairs": [["layer", 1]]}),
        ("latency.json", {"profiles": [{"name": "float"}]}),
        ("latency.json", {"format": "qvla.latency/1"}),
        ("latency.json", {"deadline": {"rate_hz": 0, "execute": 1}}),
        ("latency.json", {"deadline": 60}),
        ("settings/w4/action_error.json", {"rms": "much"}),
        ("settings/w4/action_error.json", {"rms": float("nan")}),
        ("settings/w4/action_error.json", {"mean_abs_physical": [1.0]}),
        ("settings/w4/evaluation.json", {"results": []}),
        ("settings/w4/evaluation.json", {"results": [{"task": "drawer-open"}]}),
        ("controls/blank-image.json", {"config": None}),
    ],
)
def test_damaged_values_are_artifact_errors(run: Path, name: str, damage: dict[str, Any]) -> None:
    _edit(run / name, **damage)
    with pytest.raises(ArtifactError, match=Path(name).name):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "name",
    ["run.json", "agreement.json", "latency.json", "settings/w8/evaluation.json"],
)
def test_truncated_json_is_an_artifact_error(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        write_report(run)


@pytest.mark.parametrize(
    "name",
    ["run.json", "sensitivities.safetensors", "settings/w4/plan.json", "settings/w4/bundle"],
)
def test_required_artifacts_are_named_when_missing(run: Path, name: str) -> None:
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", {"policy_digest": "0" * 64}),
        ("agreement.json", {"sensitivities_digest": "0" * 64}),
        ("settings/w4/action_error.json", {"bundle_digest": "0" * 64}),
        ("settings/w4/evaluation.json", {"digest": "0" * 64}),
        ("settings/w4/plan.json", {"budget": "another"}),
    ],
)
def test_artifacts_of_other_runs_are_refused(run: Path, name: str, change: dict[str, Any]) -> None:
    _edit(run / name, **change)
    with pytest.raises(ArtifactMismatch, match="do not belong together"):
        write_report(run)


def test_layers_have_short_names() -> None:
    dino = "vision_backbone.featurizer.encoder.layer.3.attention.q_proj"
    assert (module_of(dino), label_of(dino)) == ("DINOv2 attention", "DINOv2 3 q")
    siglip = "vision_backbone.fused_featurizer.encoder.layers.0.mlp.fc1"
    assert (module_of(siglip), label_of(siglip)) == ("SigLIP MLP", "SigLIP 0 fc1")
    language = "language_model.model.layers.11.mlp.down_proj"
    assert (module_of(language), label_of(language)) == ("Language MLP", "Language 11 down")
    assert module_of("strange.part.one.weight") == "strange.part"


def test_chromium_draws_the_page(page: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    written, picture = tmp_path / "report.html", tmp_path / "report.png"
    written.write_text(page)
    subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1280,3000", f"--screenshot={picture}",
            written.as_uri(),
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 100
    # The colours of a setting and of a width: figures are there, not only text.
    for color in ((0x1F, 0x78, 0xB8), (0xDC, 0xB6, 0x3C)):
        assert (pixels == color).all(axis=1).sum() > 20


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rename_setting(run: Path, old: str, new: str) -> None:
    (run / "settings" / old).rename(run / "settings" / new)
    names = json.loads((run / "run.json").read_text())["settings"]
    _edit(run / "run.json", settings=[new if name == old else name for name in names])
    latency = json.loads((run / "latency.json").read_text())
    for item in _named(latency):
        item["name"] = new if item["name"] == old else item["name"]
    (run / "latency.json").write_text(json.dumps(latency))


def _named(latency: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from latency["profiles"]
    yield from latency["ratios"]


def _rename_tasks(path: Path, new: str) -> None:
    text = path.read_text()
    path.write_text(text.replace(json.dumps(TASKS[0]), json.dumps(new)))
