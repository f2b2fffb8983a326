"""What OpenVINO makes of the stack: in float, quantized by NNCF, and of our expanded codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bench.contender import Contender, Run, stored_size
from engines.bench.decoder import INPUT
from engines.forms.folded import save_optimized
from engines.ort import keep_integers_exact, ort_options

FLOAT, INT8, INT4 = "OpenVINO FP32", "OpenVINO INT8 (NNCF)", "OpenVINO INT4 (NNCF)"
INT8_FLOAT_ATTENTION = "OpenVINO INT8 (NNCF), attention in float"
# Behind the name of one of our mixes.
ON_OPENVINO = " (OpenVINO)"
_GROUP = 64


@dataclass(frozen=True)
class OpenVinoBench:
    """OpenVINO on this machine, for the decoder stack in a folder."""

    folder: Path
    threads: int
    # Weights of the quantizable layers.
    weights: int

    @staticmethod
    def is_installed() -> bool:
        """Say whether the extra `openvino` is here."""
        return find_spec("openvino") is not None

    def own(self, float_path: Path, sample: NDArray[np.float32]) -> list[Contender]:
        """Return its float graph and, where NNCF is installed, its 8- and 4-bit ones.

        Args:
            float_path: the float graph as ONNX.
            sample: rows that 8-bit ranges are measured on.
        """
        import openvino

        model = openvino.Core().read_model(float_path)
        size, every = stored_size(float_path), self.weights
        found = [Contender(FLOAT, self._run(model), size, 4 * every, every, "float32")]
        if find_spec("nncf") is None:
            return found
        import nncf

        eight, spared = (
            nncf.quantize(
                model,
                nncf.Dataset([{INPUT: sample}]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=1,
                ignored_scope=nncf.IgnoredScope(names=names),
            )
            for names in ([], _attention_products(model))
        )
        four = nncf.compress_weights(
            openvino.Core().read_model(float_path),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=_GROUP,
            ratio=1.0,
            all_layers=True,
            # A width that no group divides gets smaller ones.
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )
        for name, quantized, bits, kind in (
            (INT8, eight, 8, "int8"),
            (INT8_FLOAT_ATTENTION, spared, 8, "int8"),
            (INT4, four, 4, "float32"),
        ):
            path = self.folder / f"openvino_{len(found)}.xml"
            openvino.save_model(quantized, path, compress_to_fp16=False)
            nbytes = path.stat().st_size + path.with_suffix(".bin").stat().st_size
            run = self._run(quantized)
            found.append(Contender(name, run, nbytes, every * bits // 8, every, kind))
        return found

    def ours(self, graphs: Mapping[str, tuple[Path, Contender]]) -> list[Contender]:
        """Return our graphs of rounded inputs, expanded; equal bytes on disk and products.

        Args:
            graphs: name of a mix -> its graph, and the contender that ONNX Runtime makes of it.
        """
        import openvino

        from engines.openvino_graph import read_graph

        found: list[Contender] = []
        for name, (path, other) in graphs.items():
            folder = self.folder / f"expanded_{len(found)}"
            folder.mkdir()
            options = ort_options(0, self.threads)
            keep_integers_exact(options)
            save_optimized(path, folder / path.name, options)
            run = self._run(read_graph(openvino.Core(), folder / path.name))
            found.append(
                Contender(
                    name + ON_OPENVINO,
                    run,
                    other.stored_bytes,
                    other.read_bytes,
                    other.multiplications,
                    "int8",
                )
            )
        return found

    def _run(self, model: Any) -> Run:
        import openvino

        from engines.openvino import latency_settings

        settings = latency_settings(self.threads)
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

        def run(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
            request.infer({INPUT: hidden}, share_inputs=True)
            return np.array(request.get_output_tensor(0).data)

        return run


def _attention_products(model: Any) -> list[str]:
    """Return the names of the products of two activations, which ours leave in float too."""
    return [
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul"
        and all(value.get_node().get_type_name() != "Constant" for value in node.input_values())
    ]
