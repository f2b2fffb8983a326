"""Both JetPacks' runtimes, really built: they need the package index."""

import importlib.util
import json
import os
import zipfile
from pathlib import Path

import pytest

from qvla_export.pipeline.runtime.robot_runtime import RuntimeRequest, build_runtime
from qvla_export.pipeline.runtime.robots import JETPACKS
from qvla_export.pipeline.runtime.scan import scan_zip
from qvla_export.shared.artifacts import sha256_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("pex", "uv")),
        reason="needs the extra runtime: pip install 'qvla[runtime]'",
    ),
]


@pytest.mark.parametrize("jetpack", sorted(JETPACKS))
def test_a_jetpack_has_one_file(tmp_path: Path, jetpack: str) -> None:
    system, output = JETPACKS[jetpack], tmp_path / "first" / "qvla.pex"
    built = build_runtime(RuntimeRequest(system, output))
    assert json.loads(output.with_suffix(".json").read_text())["sha256"] == sha256_file(output)
    assert output.read_bytes().startswith(f"#!/usr/bin/env python{system.python}\n".encode())
    assert os.access(output, os.X_OK) and built.nbytes < 100e6
    with zipfile.ZipFile(output) as packed:
        inside = {name.removeprefix(".deps/").split("-")[0] for name in packed.namelist()}
    # What is in the lock is in the file: PEX leaves out what nothing asks for.
    assert {name.replace("-", "_") for name in built.packages} <= {
        name.lower().replace(".", "_") for name in inside
    }
    scan = scan_zip(output, system)
    assert scan.native_files == built.native_files > 50
    assert {"onnxruntime", "numpy", "tuf", "cuda-bindings"} <= set(built.packages)
    assert any("ONNX Runtime" in note for note in built.notes) == (jetpack == "6")
    # The same lock makes the same bytes.
    lock = output.with_suffix(".lock")
    again = build_runtime(RuntimeRequest(system, tmp_path / "second" / "qvla.pex", lock=lock))
    assert (again.sha256, again.lock_sha256) == (built.sha256, built.lock_sha256)
