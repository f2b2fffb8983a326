"""What a changed release costs a robot, every byte of the network counted."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from command_runs import Inputs
from small_releases import Host, Robot, sum_bundle
from static_server import static_server
from tiny_bundles import change_manifest

from qvla_export.pipeline.release.deltas import patched_frame
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.bundle import Bundle

TOKENIZER = "tokenizer.json"


def with_another_word(bundle: Path, folder: Path) -> Path:
    """Copy a bundle whose tokenizer has a word more."""
    shutil.copytree(bundle, folder)
    tokenizer = json.loads((folder / TOKENIZER).read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 999, "content": "<x>"})
    (folder / TOKENIZER).write_text(json.dumps(tokenizer))
    path = folder / TOKENIZER
    stated = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    change_manifest(folder, lambda m: m["files"][TOKENIZER].update(stated))
    return Bundle.load(folder).path


def test_other_limits_or_another_tokenizer_cost_a_hundredth(
    tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    host = Host.new(tmp_path / "host")
    first = sum_bundle(tiny_policy, tmp_path / "a", table=1_500_000).path
    host.release(first, "a")
    with static_server(host.repository.root) as (url, served):
        robot = Robot.of(host, tmp_path / "store", url)
        whole = robot.install().release_bytes
        costs = {}
        for name, bundle, limits in (
            ("limits", first, {"p95_ms": 50.0}),
            ("tokenizer", with_another_word(first, tmp_path / "b"), {}),
        ):
            host.release(bundle, name, **limits)
            served.sent_bytes = 0
            assert robot.install().name == name
            # Metadata and the release's document are counted as well.
            costs[name] = served.sent_bytes
            assert 0 < costs[name] <= 0.01 * whole, (costs, whole)
    print(f"\nof {whole} bytes: {costs}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zstd") is None, reason="compares with the program zstd")
def test_a_changed_plan_costs_hardly_more_than_zstds_patch(inputs: Inputs, tmp_path: Path) -> None:
    done = inputs.deploy(tmp_path / "run", "--settings", "w4,w3.9")
    assert done.code == 0, done.err
    bundles = [tmp_path / "run" / "settings" / name / "bundle" for name in ("w4", "w3.9")]
    assert (bundles[0] / "plan.json").read_bytes() != (bundles[1] / "plan.json").read_bytes()
    old, new = (path / "policy.onnx.data" for path in bundles)
    words = ["zstd", "-q", "-19", "--long=27", f"--patch-from={old}", str(new), "-c"]
    theirs = len(subprocess.run(words, check=True, capture_output=True).stdout)
    ours = len(patched_frame(old.read_bytes(), new.read_bytes()))
    print(f"\nof {new.stat().st_size} bytes: {ours}, zstd -19 --patch-from {theirs}")
    assert ours <= 1.1 * theirs
    # And that is what comes.
    host = Host.new(tmp_path / "host")
    host.release(bundles[0], "w4")
    robot = Robot.of(host, tmp_path / "store")
    robot.install()
    host.release(bundles[1], "w3.9")
    second = robot.install()
    others = sum(
        path.stat().st_size
        for path in bundles[1].iterdir()
        if path.name != new.name and sha256_file(path) != _digest(bundles[0] / path.name)
    )
    assert "policy.onnx.data" in second.patched
    assert second.fetched_bytes <= 1.1 * theirs + others


def _digest(path: Path) -> str:
    return sha256_file(path) if path.is_file() else ""
