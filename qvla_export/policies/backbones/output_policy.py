"""What every backbone does as a `Policy`: its output is measured, and nothing else."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.whole_policy import WholePolicy
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.normalization import Bounds, Statistics
from qvla_export.shared.program import Program


@dataclass(frozen=True, repr=False)
class OutputPolicy(WholePolicy):
    """A network whose output stands for the action; see `Policy` for the meaning of its members."""

    def is_quantized(self, name: str) -> bool:
        """Whether a layer is quantized: every one is of a tower or a language model."""
        return True

    def kept_layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the layers that no plan quantizes: there is none."""
        return {}

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Refuse: no graph is made of a network without actions.

        Raises:
            CheckpointError: always.
        """
        raise _no_bundle()

    def program(self, layers_per_part: int | None = None) -> Program:
        """Refuse, as `parts` does.

        Raises:
            CheckpointError: always.
        """
        raise _no_bundle()


def output_statistics(width: int) -> Statistics:
    """Return statistics that leave an output of `width` numbers a token as it is."""
    ones = np.ones(width)
    return Statistics("output", Bounds(-ones, ones, np.zeros(width, np.bool_)), None)


def _no_bundle() -> CheckpointError:
    return CheckpointError(
        "a backbone has no actions: qvla bench weights measures it, and no bundle is made of it"
    )
