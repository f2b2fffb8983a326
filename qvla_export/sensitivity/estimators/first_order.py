"""First order in full (DESIGN.md), and the paper's norm products of eq. 6 and appendix G."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.measurement.backward import Contraction
from qvla_export.sensitivity.estimators.base import QUIETLY, Question, Work, looked_up
from qvla_export.sensitivity.exact import ChannelWidth
from qvla_export.sensitivity.first_order import METHODS, FirstOrder, measure_first_order
from qvla_export.sensitivity.sensitivities import Sensitivities


@dataclass(frozen=True)
class FirstOrderEstimator:
    """All channels and widths from one backward pass a probe; see `sensitivity.first_order`."""

    contraction: Contraction = "full"
    # Random probes an observation; None takes the whole Jacobian.
    probes: int | None = 4
    # Bound of what layers take together; see `qvla_export.measurement.layer_groups`.
    max_bytes: int | None = None

    @property
    def method(self) -> str:
        """As recorded."""
        return METHODS[self.contraction]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Probes."""
        return {"probes": self.probes}

    @property
    def exact_share(self) -> float:
        """None is measured by itself."""
        return 0.0

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Estimate every channel at every width."""
        # The norms are of all tokens, and no padding may be among them.
        size = question.batch_size if self.contraction == "full" else 1
        measured = measure_first_order(
            question.policy,
            question.observations,
            question.calibration_digest,
            FirstOrder(
                question.quantizer,
                question.widths,
                probes=self.probes,
                seed=question.seed,
                batch_size=size,
                contraction=self.contraction,
                max_bytes=self.max_bytes,
                moments=question.moments,
            ),
            work.progress_file,
            work.on_progress,
            work.world,
        )
        return replace(measured, settings=self.settings)

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Look the pairs up in the table, which costs the same.  float64 [pairs]"""
        return looked_up(self.table(question, work), pairs)
