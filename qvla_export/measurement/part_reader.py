"""Read the weights of a part while the one before computes: on a thread, one part ahead."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

Weights = dict[str, Tensor]


class PartReader:
    """Weights of parts in the order in which they are taken. A context manager.

    At most one part is read ahead of the one that was taken last. What goes wrong while reading is
    raised by the `take` of that part.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        order: Sequence[Sequence[str]],
        ahead: Sequence[bool],
    ) -> None:
        """Start nothing yet.

        Args:
            read: name of a weight -> the weight; called on the reading thread and on this one.
            order: the names of each part's weights.
            ahead: for each part, whether it may be read while the one before is in memory.
        """
        self._read = read
        self._order = order
        self._ahead = ahead
        self._taken = 0
        self._next: Future[Weights] | None = None
        self._ending = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="qvla-weights")

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the reading at the weight that is under way, and let go what was read."""
        self._ending.set()
        self._next = None
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self) -> Weights:
        """Return the next part's weights; begin to read those of the one after.

        Raises:
            Exception: whatever `read` raised for one of them.
        """
        number, self._taken = self._taken, self._taken + 1
        begun, self._next = self._next, None
        weights = self._weights(number) if begun is None else begun.result()
        following = self._taken
        if following < len(self._order) and self._ahead[following]:
            self._next = self._pool.submit(self._weights, following)
        return weights

    def _weights(self, number: int) -> Weights:
        weights: Weights = {}
        for name in self._order[number]:
            if self._ending.is_set():
                break
            weights[name] = self._read(name)
        return weights
