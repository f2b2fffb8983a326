"""Estimators by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from qvla_export.measurement.backward import Contraction
from qvla_export.sensitivity.estimators.base import Estimator
from qvla_export.sensitivity.estimators.cumulative import Cumulative
from qvla_export.sensitivity.estimators.exact import ExactEstimator
from qvla_export.sensitivity.estimators.first_order import FirstOrderEstimator
from qvla_export.sensitivity.estimators.hessian import HessianEstimator
from qvla_export.sensitivity.estimators.two_stage import TwoStage
from qvla_export.shared.errors import QvlaError

EstimatorName = Literal[
    "first-order",
    "norm-product",
    "isotropic-noise",
    "hessian",
    "two-stage",
    "exact",
    "cumulative",
    "cumulative-first-order",
]
# Those that take policies whose weights were left on disk.
STREAMED = ("first-order", "norm-product", "isotropic-noise", "cumulative-first-order")


@dataclass(frozen=True)
class Options:
    """What estimators may be told; each takes what concerns it."""

    # Random probes an observation; None takes the whole Jacobian.
    probes: int | None = 4
    # Of all channels: measured exactly by the second of two stages.
    share: float = 0.02
    # Bound of what is held at once.
    max_bytes: int | None = None


def _first_order(options: Options, contraction: Contraction = "full") -> FirstOrderEstimator:
    return FirstOrderEstimator(contraction, options.probes, options.max_bytes)


def _hessian(options: Options) -> HessianEstimator:
    return HessianEstimator() if options.max_bytes is None else HessianEstimator(options.max_bytes)


_MAKERS: Mapping[str, Callable[[Options], Estimator]] = {
    "first-order": _first_order,
    "norm-product": lambda options: _first_order(options, "norms"),
    "isotropic-noise": lambda options: _first_order(options, "isotropic"),
    "hessian": _hessian,
    "two-stage": lambda options: TwoStage(_first_order(options), options.share),
    "exact": lambda options: ExactEstimator(),
    "cumulative": lambda options: Cumulative(ExactEstimator()),
    "cumulative-first-order": lambda options: Cumulative(_first_order(options)),
}


def find_estimator(name: str, options: Options | None = None) -> Estimator:
    """Return an estimator.

    Raises:
        QvlaError: there is none of this name, or an option is out of range or not for it.
    """
    options = options or Options()
    if name not in _MAKERS:
        raise QvlaError(f"a method is one of {list(get_args(EstimatorName))}, got {name!r}")
    return _MAKERS[name](options)
