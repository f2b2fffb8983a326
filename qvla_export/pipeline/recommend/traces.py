"""Action chunks of all policies and the demonstrator on a few held-out observations, as JSON."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Chunks side by side in a figure as wide as a phone.
_MOST = 6
DEMONSTRATED = "demonstrated"


def traces(
    demonstrated: NDArray[np.float64] | None, policies: Mapping[str, NDArray[np.float64]]
) -> dict[str, Any]:
    """Return the chunks of a few held-out observations, spread over all of them.

    Observations whose chunk was demonstrated to its end come first.

    Args:
        demonstrated: NaN behind an episode's end; None where no actions were recorded.
        policies: name -> actions in their own units.  float64 [n, horizon, dim]

    Returns:
        "observations", their numbers; "actions": policy or "demonstrated" -> chunks of steps of
        numbers, null where nothing was demonstrated.
    """
    count = len(next(iter(policies.values())))
    rows = np.arange(count)
    actions = dict(policies)
    if demonstrated is not None:
        whole = np.flatnonzero(np.isfinite(demonstrated).all(axis=(1, 2)))
        rows = whole if len(whole) else rows
        actions = {DEMONSTRATED: demonstrated, **actions}
    spread = np.linspace(0, len(rows) - 1, min(_MOST, len(rows))).round().astype(int)
    chosen = rows[np.unique(spread)]
    return {
        "observations": chosen.tolist(),
        "actions": {name: _rounded(values[chosen]) for name, values in actions.items()},
    }


def _rounded(values: NDArray[np.float64]) -> Any:
    # Seven digits are a float32's.
    return [
        [[float(f"{v:.7g}") if np.isfinite(v) else None for v in step] for step in chunk]
        for chunk in values.tolist()
    ]
