"""NVIDIA's quantizer of ONNX graphs, in an environment of its own.

modelopt 0.47 needs onnx 1.21 and onnxruntime 1.24, QVLA onnx 1.23 and onnxruntime 1.32: they cannot
be installed together. Its environment borrows torch and all else from QVLA's; its graphs run in
QVLA's onnxruntime, like everyone's.
"""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.bench.decoder import INPUT
from qvla_export.shared.errors import QvlaError

# Installed without their dependencies: those are QVLA's, or for GPUs.
REQUIREMENTS = (
    "nvidia-modelopt==0.47.0",
    "onnx==1.21.0",
    "onnxruntime==1.24.4",
    "onnx-graphsurgeon==0.6.1",
    "onnxconverter-common==1.16.0",
    "polygraphy==0.53.6",
    "onnxslim==0.1.98",
    "omegaconf==2.4.0",
    "pulp==3.3.2",
    "lief==1.0.0",
    "ninja==1.13.2",
    "nvidia-ml-py==13.615.71",
    "cppimport==26.4.17",
    "pybind11==3.1.0",
    "mako==1.4.3",
    "requests==2.34.2",
)
_SCRIPT = """
import json, sys
import numpy as np
from modelopt.onnx.quantization import quantize
arguments = json.loads(sys.argv[1])
sample = {arguments.pop("input"): np.load(arguments.pop("sample"))}
quantize(calibration_data=sample, high_precision_dtype="fp32", calibration_eps=["cpu"],
         use_external_data_format=True, log_level="WARNING", **arguments)
"""


@dataclass(frozen=True)
class ModeloptEnvironment:
    """A virtual environment with modelopt."""

    folder: Path

    def create(self) -> None:
        """Make it with pip, unless it is there.

        Raises:
            QvlaError: pip failed; the message has its last lines.
        """
        stamp = self.folder / "complete"
        if stamp.is_file():
            return
        _run([sys.executable, "-m", "venv", str(self.folder)])
        packages = next((self.folder / "lib").glob("python*")) / "site-packages"
        (packages / "qvla.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _run([str(self._python), "-m", "pip", "install", "--no-deps", "--quiet", *REQUIREMENTS])
        stamp.touch()

    def quantize(
        self,
        source: Path,
        destination: Path,
        mode: str,
        method: str,
        sample: NDArray[np.float32],
    ) -> None:
        """Quantize a graph.

        Args:
            source, destination: .onnx files.
            mode: "int8" (weights and activations) or "int4" (weights, blocks of 128).
            method: modelopt's calibration method: "max"; "rtn_dq", "awq_lite".
            sample: an input to calibrate with.

        Raises:
            QvlaError: modelopt failed; the message has its last lines.
        """
        np.save(destination.with_suffix(".npy"), sample)
        arguments = {
            "onnx_path": str(source),
            "output_path": str(destination),
            "quantize_mode": mode,
            "calibration_method": method,
            "input": INPUT,
            "sample": str(destination.with_suffix(".npy")),
        }
        _run([str(self._python), "-c", _SCRIPT, json.dumps(arguments)])

    @property
    def _python(self) -> Path:
        return self.folder.absolute() / "bin" / "python"


def _run(command: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise QvlaError(
            f"{command[0]} failed: {done.stderr[-600:]}; bench without --modelopt, or remove the "
            "folder to make it anew"
        )
