"""What a `Family` does whose policies are read whole, whatever its layout."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.shared.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.whole_policy import WholePolicy


class WholeFamily(abc.ABC):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    sizes: tuple[str, ...] = ()
    # How people write its name, and why such a checkpoint cannot be smoothed.
    title: str
    unsmoothed: str

    @abc.abstractmethod
    def load(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> "WholePolicy":
        """Load a checkpoint folder."""

    def can_stay_on_disk(self, checkpoint: Path, preset: str | None) -> bool:
        """Whether weights can be left on disk: no, parts are not small enough to gain by it."""
        return False

    def open(
        self, checkpoint: Path, unnorm_key: str | None, preset: str | None, resident: bool
    ) -> "WholePolicy":
        """Load a checkpoint folder; see `load`.

        Raises:
            CheckpointError: its weights are to be left on disk.
        """
        if not resident:
            raise CheckpointError(f"{checkpoint}: {self.title} policies are loaded whole")
        return self.load(checkpoint, unnorm_key, preset)

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` would refuse."""
        self.load(checkpoint, unnorm_key, preset)

    def write_smoothed(
        self, checkpoint: Path, output: Path, factors: "Mapping[str, Tensor]", keep_types: bool
    ) -> None:
        """Refuse: no such checkpoint is smoothed here.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{checkpoint}: {self.title} checkpoints cannot be smoothed on disk: "
            f"{self.unsmoothed}; leave smoothing out"
        )

    def write_random_checkpoint(
        self,
        output: Path,
        size: str,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Refuse: there is no published size of it.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{size!r} is no size of {self.title} that can be written")
