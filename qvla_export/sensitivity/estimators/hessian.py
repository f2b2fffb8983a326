"""The official code's proxy: weight errors against the inverse of the inputs' second moment.

Not a sensitivity of the action but of a layer's own output; here as a baseline. Source: QVLA,
`openvla/qvla/sensitivity_hessian_proxy.py`, which the golden data in `tests/data/oracles` pin.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.measurement.sharded_sums import ShardedSums
from qvla_export.policies.layers import error_rows, layer_shapes, traced_layers
from qvla_export.sensitivity.estimators.base import QUIETLY, ChannelWidth, Question, Work, looked_up
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError

METHOD = "input Hessian proxy"
# Of the mean diagonal, added to the diagonal; the official default.
DAMPING = 0.01
_SMALLEST_SQUARE = 1e-12
_FLOAT64_BYTES = 8


class InputMoment:
    """H = 2 / n sum of x x^T over a layer's inputs x; n counts the first axis, not tokens."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self._layer = layer
        inputs = layer.weight[0].numel()
        self._sum = torch.zeros(inputs, inputs, dtype=torch.float64, device=layer.weight.device)
        self._count = 0

    def add(self, inputs: Tensor, square: Tensor | None = None) -> Tensor:
        """Add what the layer is fed in one call.

        Args:
            inputs: [N, ..., in], [tokens, in] (which counts once) or [N, in channels, H, W].
            square: sum of x x^T of these inputs, if known.  [in, in]

        Returns:
            The sum of x x^T.  [in, in]
        """
        if square is None:
            columns = input_columns(self._layer, inputs).float()
            square = columns.T @ columns
        self._sum += square
        self._count += 1 if inputs.ndim == 2 else inputs.shape[0]
        return square

    @property
    def matrix(self) -> Tensor:
        """Return H.  float64 [inputs, inputs]

        Raises:
            QvlaError: nothing was added, or something that is not finite.
        """
        if not self._count or not torch.isfinite(self._sum).all():
            raise QvlaError("a layer was fed nothing, or NaN or infinity; the policy is broken")
        return self._sum * (2 / self._count)


def input_columns(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what each of a layer's outputs is a product with, of all images.  [tokens, inputs]

    Raises:
        QvlaError: a convolution in groups, whose outputs see different inputs.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    padding = (0, 0) if layer.padding == "valid" else layer.padding
    if layer.groups != 1 or isinstance(padding, str):
        raise QvlaError(
            "the input Hessian proxy takes no convolutions in groups or with padding 'same', got "
            f"{layer.groups} groups and padding {layer.padding!r}; choose another method"
        )
    patches = nn.functional.unfold(
        inputs,
        layer.weight.shape[2:],
        layer.dilation,
        padding,
        layer.stride,
    )  # [N, inputs, positions]
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def inverse_factor_diagonal(matrix: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the diagonal of the upper Cholesky factor of the damped H's inverse.

    Args:
        matrix: H; left as it is.  float64 [inputs, inputs]
        damping: share of the mean diagonal that is added to the diagonal. Inputs that are always
            zero count as 1.

    Returns:
        float64 [inputs]
    """
    damped = matrix.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.diagonal()


def hessian_proxy(
    errors: NDArray[np.float32], diagonal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return sum over inputs of dW^2 / d^2 of each channel.  float64 [channels]

    Args:
        errors: dW, what quantizing adds to the weights.  float32 [channels, inputs]
        diagonal: d, as `inverse_factor_diagonal` returns it.  float64 [inputs]
    """
    squares = np.maximum(diagonal**2, _SMALLEST_SQUARE)
    summed: NDArray[np.float64] = (errors.astype(np.float64) ** 2 / squares).sum(axis=1)
    return summed


@dataclass(frozen=True)
class HessianEstimator:
    """The proxy for all layers, from one pass over the observations for as many as fit."""

    # Bound of the matrices that are held together; a single larger one is held all the same.
    max_bytes: int = 2_000_000_000

    @property
    def method(self) -> str:
        """Return the name that is recorded."""
        return METHOD

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the official damping."""
        return {"damping": DAMPING}

    @property
    def exact_share(self) -> float:
        """Return 0: no pair is measured by itself."""
        return 0.0

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Estimate every channel at every width; a killed run redoes the layers under way."""
        layers = traced_layers(question.policy)
        shapes = layer_shapes(layers)
        groups = self._groups(shapes)
        identity = {
            "method": METHOD,
            "policy_digest": question.policy.digest,
            "calibration_digest": question.calibration_digest,
            "observations": len(question.observations),
            "quantizer": question.quantizer.to_json(),
            "widths": question.widths,
            "groups": groups,
        }
        empty = {name: np.zeros((len(question.widths), c)) for name, (c, _) in shapes.items()}
        sums = ShardedSums(empty, identity, work.progress_file, work.world)
        for unit in sums.share(range(len(groups))):
            group = {name: layers[name] for name in groups[unit]}
            moments = _measured(question, group, _teller(work, sums, len(groups), question))
            for name, layer in group.items():
                diagonal = inverse_factor_diagonal(moments[name].matrix).cpu().numpy()
                for row, bits in enumerate(question.widths):
                    errors = error_rows(layer, bits, question.quantizer)
                    sums.values[name][row] = hessian_proxy(errors, diagonal)
            sums.mark(unit)
        total = sums.total()
        return Sensitivities(
            values={name: total[name].astype(np.float32) for name in layers},
            widths=question.widths,
            weights_per_channel={name: inputs for name, (_, inputs) in shapes.items()},
            method=METHOD,
            samples=len(question.observations),
            probes=0,
            policy_digest=question.policy.digest,
            calibration_digest=question.calibration_digest,
            quantizer=question.quantizer,
            settings=self.settings,
        )

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Look the pairs up in the table, which costs the same.  float64 [pairs]"""
        return looked_up(self.table(question, work), pairs)

    def _groups(self, shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
        groups: list[list[str]] = []
        used = 0
        for name, (_, inputs) in shapes.items():
            need = _FLOAT64_BYTES * inputs**2
            if not groups or used + need > self.max_bytes:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += need
        return groups


def _measured(
    question: Question,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    tell: Callable[[int], None],
) -> dict[str, InputMoment]:
    """Return the input moments of some layers over all observations, each by itself.

    In batches of several, padding would count.
    """
    moments = {name: InputMoment(layer) for name, layer in layers.items()}
    for number, observation in enumerate(question.observations, 1):
        batch = question.policy.batch([observation])
        with torch.no_grad(), _hooked(layers, moments):
            question.policy.normalized_actions(batch)
        tell(number)
    return moments


@contextlib.contextmanager
def _hooked(
    layers: Mapping[str, nn.Linear | nn.Conv2d], moments: Mapping[str, InputMoment]
) -> Iterator[None]:
    # The last input and its square: query, key and value, gate and up are fed the same tensor.
    last: list[Tensor] = []

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs: Tensor = arguments[0]
            known = isinstance(module, nn.Linear) and bool(last) and last[0] is inputs
            square = moments[name].add(inputs, last[1] if known else None)
            last[:] = [inputs, square] if isinstance(module, nn.Linear) else []

        return record

    handles = [layer.register_forward_pre_hook(recorder(n)) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _teller(
    work: Work, sums: ShardedSums, groups: int, question: Question
) -> Callable[[int], None]:
    done, count = sums.done(range(groups)), len(question.observations)

    def tell(number: int) -> None:
        if work.on_progress is not None:
            work.on_progress(min(done * count + number, groups * count), groups * count)

    return tell
