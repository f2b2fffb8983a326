"""A bundle vouches for every byte and runs without torch, transformers or onnx."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT
from tiny_bundles import change_manifest, make_bundle, mixed_plan

from engines.load import load_engine
from engines.targets import UnknownTarget
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch
from qvla_export.shared.observation import Observation

FILES = (
    "manifest.json",
    "policy.onnx",
    "policy.onnx.data",
    "tokenizer.json",
    "golden.safetensors",
    "plan.json",
)


@pytest.fixture(scope="module")
def original(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("bundles") / "mixed"
    return make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(3), path)


@pytest.fixture
def copied(original: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.path, tmp_path / "bundle"))


def test_round_trip(
    original: Bundle,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
) -> None:
    loaded = Bundle.load(original.path)
    assert loaded.digest == original.digest
    assert loaded.target == "cpu"
    assert loaded.policy_digest == tiny_policy.digest
    assert loaded.processor.spec == tiny_policy.processor.spec
    assert sorted(file.name for file in loaded.path.iterdir()) == sorted(FILES)
    # By the account that serves as well, whoever made it.
    assert {file.stat().st_mode & 0o777 for file in loaded.path.iterdir()} == {0o644}
    assert loaded.path.stat().st_mode & 0o777 == 0o755
    plan = loaded.plan
    assert plan is not None
    assert plan["digest"] == sha256_file(loaded.path / "plan.json")
    observation = tiny_observations(1)[0]
    stored = loaded.golden().feeds[0]
    for name, feed in loaded.processor.feeds(observation).items():
        np.testing.assert_array_equal(feed, tiny_policy.processor.feeds(observation)[name])
        np.testing.assert_array_equal(feed, stored[name])


def test_a_bundle_of_before_order_and_biases_counted_still_acts(copied: Path) -> None:
    """Its manifest has fewer kinds of bytes, its plan is of format 1: it runs all the same."""
    text = (copied / "plan.json").read_text().replace("qvla-plan-2", "qvla-plan-1")
    (copied / "plan.json").write_text(text)

    def as_before(manifest: dict[str, Any]) -> None:
        rest = sum(manifest["weight_bytes"].pop(kind) for kind in ("order", "biases"))
        manifest["weight_bytes"]["rest"] += rest
        manifest["files"]["plan.json"]["sha256"] = sha256_file(copied / "plan.json")
        manifest["plan"]["digest"] = sha256_file(copied / "plan.json")

    change_manifest(copied, as_before)
    bundle = Bundle.load(copied)
    assert "order" not in bundle.weight_bytes
    golden = bundle.golden()
    with load_engine(bundle) as engine:
        found = engine.infer(golden.feeds[0])["actions"]
    np.testing.assert_allclose(found[0], golden.reference[0], atol=1e-4)
    with pytest.raises(ArtifactError, match=r"qvla-plan-1.*qvla export for a bundle"):
        BitPlan.load(copied / "plan.json")


@pytest.mark.parametrize("name", FILES)
def test_flipped_byte_is_found(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    index = data.index(b"cpu") if name == "manifest.json" else len(data) // 2
    data[index] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(ArtifactMismatch, match=rf"{name} is damaged: expected SHA-256 \w+, found"):
        Bundle.load(copied)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        Bundle.load(copied)


def test_truncated_manifest(copied: Path) -> None:
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Bundle.load(copied)


@pytest.mark.parametrize("value", [[], {"format": "onnx-model-9"}, {}])
def test_foreign_manifest(copied: Path, value: object) -> None:
    (copied / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="qvla-bundle-2"):
        Bundle.load(copied)


@pytest.mark.parametrize("field", ["files", "processor", "inputs"])
def test_manifest_without_a_field(copied: Path, field: str) -> None:
    change_manifest(copied, lambda m: m.update({field: None}))
    with pytest.raises(ArtifactError, match="manifest"):
        Bundle.load(copied)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "..", ""])
def test_file_outside_the_folder_is_refused(copied: Path, name: str) -> None:
    files = json.loads((copied / "manifest.json").read_text())["files"]
    change_manifest(
        copied, lambda m: m.update(files={**files, name: {"sha256": "0" * 64, "bytes": 1}})
    )
    with pytest.raises(ArtifactError, match="must lie in its folder"):
        Bundle.load(copied)


def test_link_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "policy.onnx").rename(tmp_path / "elsewhere")
    (copied / "policy.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="missing or a link"):
        Bundle.load(copied)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="bundle folder not found"):
        Bundle.load(tmp_path / "nothing")


def test_unknown_target(copied: Path) -> None:
    change_manifest(copied, lambda m: m.update(target="orion"))
    with pytest.raises(UnknownTarget, match=r"'orion' is unknown; there are \[.*'cpu'"):
        load_engine(Bundle.load(copied))


_ROBOT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript"):
            raise ImportError(f"{name} is not installed on the robot")

sys.meta_path.insert(0, Blocked())
from pathlib import Path
import numpy as np
from engines.load import load_engine
from engines.verify import verify
from jetson.policy import EnginePolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation

bundle = Bundle.load(Path(sys.argv[1]))
with load_engine(bundle, threads=1) as engine:
    assert verify(bundle, engine).drift.worst <= 1e-3
    seen = Observation({"image": np.zeros((28, 28, 3), np.uint8)}, "push it", np.zeros(4))
    chunk = EnginePolicy(bundle, engine).infer(seen)
assert chunk.actions.shape == (4, 4)
print("acted", sorted(chunk.timing_ms))
"""


def test_runs_without_torch_transformers_or_onnx(original: Bundle) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", _ROBOT, str(original.path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "acted ['engine', 'engine.policy', 'postprocess', 'preprocess']\n"
