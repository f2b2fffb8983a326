"""Where the tensors of an OpenVLA checkpoint lie; of the output layer, the action tokens' rows."""

from pathlib import Path

from qvla_export.policies.openvla.files import require_body_alone
from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.weights import CheckpointWeights, open_body
from qvla_export.shared.errors import CheckpointError


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
    weights = open_body(checkpoint)
    if HEAD not in weights.shapes:
        return weights  # which is said where keys are compared
    last = weights.shapes[HEAD].shape[0] - vocab_padding
    if last < action_tokens:
        raise CheckpointError(
            f"{checkpoint}: the output layer has {last} rows before its padding, which are "
            f"fewer than the {action_tokens} action tokens; check pad_to_multiple_of and "
            "n_action_bins of config.json"
        )
    return weights.with_rows(HEAD, slice(last - action_tokens, last))
