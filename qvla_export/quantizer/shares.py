"""What inputs answer of each other's errors, whole and cut up as an elimination takes them."""

from qvla_export.quantizer.arrays import Array, Arrays


class Shares:
    """What each input answers of what is missing before it, in the order of elimination.

    Of moments M = R R^T with R upper, place i answers best what is missing before it with the
    shares R[:i, i] / R[i, i]: the linear feedback of QuIP (Chee et al. 2023), equal to GPTQ's,
    without an inverse.
    """

    def __init__(self, factor: Array, arrays: Arrays) -> None:
        """Take the factor R.

        Args:
            factor: upper triangle, used up.  [inputs, inputs]
            arrays: operations.
        """
        factor /= factor.diagonal() + 0
        self.matrix, self._arrays = factor, arrays
        self._of_runs: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def of_runs(self, start: int, stop: int, length: int, wide: int) -> tuple[Array, Array]:
        """Return the shares of inputs [start, stop) in runs; the last run is filled with zeros.

        Args:
            start: first input.
            stop: after the last.
            length: of a run.
            wide: how often a share in a run's own inputs is repeated.

        Returns:
            Of each run in all inputs of earlier ones, zero elsewhere [runs, length, inputs], and
            in its own's earlier ones [earlier, later, runs, wide].
        """
        key = start, stop, length, wide
        if key not in self._of_runs:
            runs = -(-(stop - start) // length)
            before = self._arrays.zeros((runs, length, runs * length), self.matrix)
            own = self._arrays.zeros((length, length, runs, wide), self.matrix)
            for number in range(runs):
                first = start + number * length
                count = min(length, stop - first)
                run = slice(first, first + count)
                before[number, :count, : first - start] = self.matrix[start:first, run].T
                within = self._arrays.above_diagonal(self.matrix[run, run])
                own[:count, :count, number] = within[:, :, None]
            self._of_runs[key] = before, own
        return self._of_runs[key]
