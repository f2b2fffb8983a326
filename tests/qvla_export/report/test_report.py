"""The report: one page, self-contained, whose numbers are the artifacts' numbers."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import SETTINGS, Outline, edit_json

from qvla_export.quantizer.layer_names import label_of, module_of
from qvla_export.quantizer.plan import BitPlan
from qvla_export.report.page import write_report
from qvla_export.report.run_data import read_run
from qvla_export.report.tables import summary
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import ArtifactError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@pytest.fixture(scope="module")
def page(pristine_report_run: Path) -> str:
    """The page of the undamaged run."""
    return write_report(pristine_report_run).read_text()


def test_page_is_self_contained_and_valid_enough(page: str) -> None:
    outline = Outline(page)
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
    assert (
        page.count("<figure") == 11
    )  # traces, four results, two + one sensitivities, shares, two plans
    assert page.count('role="img"') == page.count("<svg") == 11
    assert "Nothing on this page was run on a GPU" in page
    assert "Not in this run" not in page


def test_numbers_in_the_table_are_those_of_the_artifacts(
    pristine_report_run: Path, page: str
) -> None:
    page = html.unescape(page).replace("\u00a0", " ")
    latency = json.loads((pristine_report_run / "latency.json").read_text())
    for index, name in enumerate(SETTINGS):
        folder = pristine_report_run / "settings" / name
        row = page[page.index(f"<span>{name}</span>", page.index('id="comparison"')) :]
        row = row.split("</tr>")[0]
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


@pytest.mark.usefixtures("empty_figures")
def test_divergence_of_tokens_has_a_column_where_there_is_one(
    pristine_report_run: Path, page: str, tmp_path: Path
) -> None:
    run = shutil.copytree(pristine_report_run, tmp_path / "run")
    edit_json(run / "settings/w4/action_error.json", token_kl=0.0123)
    assert ">KL of tokens<" not in page
    decoding = write_report(run).read_text()
    assert decoding.count(">KL of tokens<") >= 1 and decoding.count("0.0123 nats") == 1
    edit_json(run / "settings/w4/action_error.json", token_kl="much")
    with pytest.raises(ArtifactError, match="action error"):
        write_report(run)


def test_layers_that_stay_in_16_bits_are_shown_most_sensitive_first(
    pristine_report_run: Path, page: str
) -> None:
    kept = Sensitivities.load(pristine_report_run / "kept_layers.safetensors")
    assert {"projector.fc1", "action_head.model.fc2", "proprio_projector.fc1"} <= set(kept.values)
    table = html.unescape(page)[page.index("Layers that stay in 16 bits") :].split("</table>")[0]
    totals = {name: float(kept.at(name, 4).sum()) for name in kept.values}
    for name, total in totals.items():
        place = table.index(f"{_NUMBER.sub('*', name)}</span>")
        if not _NUMBER.search(name):
            assert f"{total:.3g}" in table[place:].split("</tr>")[0]
    single = sorted((n for n in totals if not _NUMBER.search(n)), key=lambda n: -totals[n])
    places = [table.index(f"<span>{name}</span>") for name in single]
    assert places == sorted(places)
    assert "last projection" in table and "the paper's exclusion" in table


def test_summary_sentence_is_computed(page: str) -> None:
    sentence = re.search(r"<p>(At [^<]*mean bits.*?)</p>", page.replace("\u00a0", " "))
    assert sentence is not None
    assert "mean bits per channel (w4)" in sentence[1]
    assert "of 10 episodes (float:" in sentence[1]
    assert "that of round-to-nearest (w4-rtn)" in sentence[1]


def test_only_equal_bits_are_compared(pristine_report_run: Path) -> None:
    data = read_run(pristine_report_run)
    assert "that of round-to-nearest (w4-rtn)" in summary(data)
    # Without w4, the uniform one of half the bits is no rival of w8.
    others = tuple(setting for setting in data.settings if setting.name != "w4")
    text = summary(replace(data, settings=others, recommendation=None))
    assert "(w8)" in text and "round-to-nearest" not in text


def test_equal_runs_give_equal_bytes(pristine_report_run: Path, page: str) -> None:
    assert write_report(pristine_report_run).read_text() == page


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
            "--window-size=1280,5000", f"--screenshot={picture}",
            written.as_uri(),
        ],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    with Image.open(picture) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.uint32), -1, 0)
    pixels = red << 16 | green << 8 | blue
    assert len(np.unique(pixels)) > 100
    # The colours of a setting and of a width: figures are there, not only text.
    for color in (0x1F78B8, 0xDCB63C):
        assert (pixels == color).sum() > 20
