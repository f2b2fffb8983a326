"""What the tiny policy's layers are fed, measured once."""

from collections.abc import Callable

import pytest

from qvla_export.measurement.measure_activations import measure_activations
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activation_statistics import ActivationStatistics
from qvla_export.shared.observation import Observation


@pytest.fixture(scope="session")
def statistics(
    tiny_policy: OftPolicy, tiny_observations: Callable[..., list[Observation]]
) -> ActivationStatistics:
    """Of four observations."""
    return measure_activations(tiny_policy, tiny_observations(4), "set")
