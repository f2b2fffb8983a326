"""Estimators by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from qvla_export.errors import QvlaError
from qvla_export.estimators.base import Estimator
from qvla_export.estimators.cumulative import Cumulative
from qvla_export.estimators.exact import ExactEstimator
from qvla_export.estimators.first_order import FirstOrderEstimator
from qvla_export.estimators.hessian import HessianEstimator
from qvla_export.estimators.two_stage import TwoStage

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
# Those whose error is measured along with them, so that a bound can stop them.
_BOUNDED = ("first-order", "norm-product", "isotropic-noise", "two-stage", "cumulative-first-order")
# Those that take policies whose weights were left on disk.
STREAMED = ("first-order", "norm-product", "isotropic-noise", "cumulative-first-order")


@dataclass(frozen=True)
class Options:
    """What estimators may be told; each takes what concerns it."""

    # Random probes an observation, to begin with; None takes the whole Jacobian.
    probes: int | None = 4
    # Relative standard error at which first-order methods stop.
    max_standard_error: float | None = None
    # Of all channels: measured exactly by the second of two stages.
    share: float = 0.02
    # Bound of what is held at once.
    max_bytes: int | None = None


def _first_order(options: Options) -> FirstOrderEstimator:
    bound, most = options.max_standard_error, options.max_bytes
    return FirstOrderEstimator("full", options.probes, bound, most)


def _norm_product(options: Options) -> FirstOrderEstimator:
    bound, most = options.max_standard_error, options.max_bytes
    return FirstOrderEstimator("norms", options.probes, bound, most)


def _isotropic_noise(options: Options) -> FirstOrderEstimator:
    bound, most = options.max_standard_error, options.max_bytes
    return FirstOrderEstimator("isotropic", options.probes, bound, most)


def _hessian(options: Options) -> HessianEstimator:
    return HessianEstimator() if options.max_bytes is None else HessianEstimator(options.max_bytes)


_MAKERS: Mapping[str, Callable[[Options], Estimator]] = {
    "first-order": _first_order,
    "norm-product": _norm_product,
    "isotropic-noise": _isotropic_noise,
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
    if options.max_standard_error is not None and name not in _BOUNDED:
        raise QvlaError(
            f"a standard error stops {list(_BOUNDED)} only, got {options.max_standard_error} for "
            f"{name!r}; leave it out"
        )
    return _MAKERS[name](options)
