"""What a `Family` of checkpoints in LeRobot's layout does, whatever its network."""

import abc
from collections.abc import Mapping
from pathlib import Path

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.policies.assumptions import with_assumptions
from qvla_export.policies.whole_family import WholeFamily
from qvla_export.shared.json_documents import Node
from qvla_export.shared.lerobot.lerobot_config import is_lerobot, read_lerobot_config
from qvla_export.shared.policy_interface import lerobot_interface


class LeRobotFamily(WholeFamily):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name: str
    # What config.json calls its type.
    model_type: str

    @abc.abstractmethod
    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of the layers; reads no weights."""

    @abc.abstractmethod
    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `lerobot.files.check_files`."""

    def assumptions(self, checkpoint: Path, preset: str | None) -> Mapping[str, object]:
        """Return the fields that no file says, with their values: none, config.json says all."""
        return {}

    def recognizes(self, checkpoint: Path) -> bool:
        """Whether config.json is of a LeRobot policy of this type."""
        return is_lerobot(checkpoint) and read_lerobot_config(checkpoint).type == self.model_type

    def describe(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> str:
        """Say in one line what a checkpoint was found to be, and what is assumed of it.

        Raises:
            CheckpointError, ArtifactError: as `read_lerobot_config`.
        """
        config = read_lerobot_config(checkpoint, preset)
        interface = lerobot_interface(config)
        what = f"{checkpoint}: {self.name}, {interface.horizon} actions of {interface.action_dim}"
        what += f", cameras {'/'.join(interface.cameras)}, state {interface.state_dim}"
        what += _execution(config.node, interface.horizon)
        return with_assumptions(what, self.assumptions(checkpoint, preset))


def _execution(node: Node, horizon: int) -> str:
    """Say how LeRobot executes a policy's chunks; here it is the control loop that does."""
    if node.has("temporal_ensemble_coeff"):
        decay = node.field("temporal_ensemble_coeff").number()
        return f"; LeRobot ensembles chunks: qvla run --mode ensemble --ensemble-decay {decay:g}"
    if node.has("n_action_steps"):
        count = node.field("n_action_steps").whole(1, horizon)
        return f"; LeRobot executes {count} of a chunk: qvla run --mode receding --execute {count}"
    return ""
