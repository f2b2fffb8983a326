"""Exact sensitivities (eq. 4) as an estimator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.policies.layers import layer_shapes, traced_layers
from qvla_export.sensitivity.estimators.base import QUIETLY, Question, Work
from qvla_export.sensitivity.exact import METHOD, ChannelWidth, all_pairs, measure_exact
from qvla_export.sensitivity.sensitivities import Sensitivities


@dataclass(frozen=True)
class ExactEstimator:
    """One forward pass a channel, width and observation; see `qvla_export.sensitivity.exact`."""

    @property
    def method(self) -> str:
        """As recorded."""
        return METHOD

    @property
    def exact_share(self) -> float:
        """All."""
        return 1.0

    @property
    def settings(self) -> Mapping[str, Any]:
        """None."""
        return {}

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Measure every channel at every width."""
        shapes = layer_shapes(traced_layers(question.policy))
        measured = self.of_pairs(question, all_pairs(shapes, question.widths), work)
        values = {}
        start = 0
        for name, (channels, _) in shapes.items():
            block = measured[start : start + len(question.widths) * channels]
            values[name] = block.reshape(-1, channels).astype(np.float32)
            start += block.size
        return Sensitivities(
            values=values,
            widths=question.widths,
            weights_per_channel={name: inputs for name, (_, inputs) in shapes.items()},
            method=self.method,
            samples=len(question.observations),
            probes=0,
            policy_digest=question.policy.digest,
            calibration_digest=question.calibration_digest,
            quantizer=question.quantizer,
        )

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Measure some pairs.  float64 [pairs]"""
        return measure_exact(
            question.policy,
            question.observations,
            pairs,
            question.quantizer,
            question.batch_size,
            work.on_progress,
            progress_file=work.progress_file,
            world=work.world,
            calibration_digest=question.calibration_digest,
        )
