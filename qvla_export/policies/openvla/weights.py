"""Where the tensors of an OpenVLA checkpoint lie; of the output layer, the action tokens' rows."""

from pathlib import Path

from torch import Tensor

from qvla_export.policies.openvla.files import require_body_alone
from qvla_export.policies.prismatic.keys import from_upstream
from qvla_export.policies.prismatic.weights import CheckpointWeights, stored_tensors
from qvla_export.shared.errors import CheckpointError

HEAD = "language_model.lm_head.weight"


def open_weights(checkpoint: Path, vocab_padding: int, action_tokens: int) -> CheckpointWeights:
    """Find every tensor of a checkpoint: safetensors, single or sharded.

    Args:
        checkpoint: the folder.
        vocab_padding: rows behind the vocabulary's last id.
        action_tokens: ids before them that stand for actions.

    Raises:
        CheckpointError: no weights, a missing, truncated or unsafe file, one that would not be
            used, an adapter's, or a vocabulary without room for the action tokens.
    """
    require_body_alone(checkpoint)
    shapes: dict[str, Tensor] = {}
    places: dict[str, tuple[Path, str]] = {}
    for path, key, stored in stored_tensors(checkpoint):
        for name, tensor in from_upstream({key: stored}).items():
            shapes[name], places[name] = tensor, (path, key)
    rows: dict[str, slice] = {}
    if HEAD in shapes:
        last = shapes[HEAD].shape[0] - vocab_padding
        if last < action_tokens:
            raise CheckpointError(
                f"{checkpoint}: the output layer has {last} rows before its padding, which are "
                f"fewer than the {action_tokens} action tokens; check pad_to_multiple_of and "
                "n_action_bins of config.json"
            )
        rows[HEAD] = slice(last - action_tokens, last)
        shapes[HEAD] = shapes[HEAD][rows[HEAD]]
    return CheckpointWeights(shapes, places, {}, rows)
