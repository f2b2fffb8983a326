"""The examples do what they say: the notebook is executed, the scripts go on where it ended."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the checkout's checkpoints, where the notebook has been executed."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    notebook = nbformat.read(EXAMPLES / "quantize_policy.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        client = NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    nbformat.write(notebook, folder / "executed.ipynb")
    return folder


def run(script: str, arguments: Sequence[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_notebook_shows_tables_and_one_line_of_everything(folder: Path) -> None:
    notebook = nbformat.read(folder / "executed.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2  # what it sees, what it does
    shown = [o.data for o in outputs if o.output_type == "execute_result"]
    assert sum("text/html" in data for data in shown) >= 2  # sensitivities and plan
    for data in shown:
        assert len(data["text/plain"]) < 300
    assert not nbformat.read(EXAMPLES / "quantize_policy.ipynb", as_version=4).cells[1].outputs


def test_the_script_keeps_what_the_notebook_made_and_its_bundle_serves(folder: Path) -> None:
    said = run("quantize_policy.py", ["--run", "runs/example"], folder)
    assert "step 1 of 3: calibration kept" in said
    assert "step 2 of 3: sensitivities of every channel and width kept" in said
    served = run("serve_bundle.py", ["runs/example/settings/w4/bundle"], folder)
    assert served.startswith("http://127.0.0.1:") and "<ActionChunk: 8 actions" in served
