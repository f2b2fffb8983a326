"""Where the tensors of a UniVLA checkpoint lie: the body, the latent tokens' rows, the decoder."""

from pathlib import Path

from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.weights import CheckpointWeights, open_body
from qvla_export.policies.univla.files import DECODER, decoder_file, require_parts_used
from qvla_export.shared.errors import CheckpointError

# Of decoders that are built otherwise: UniVLA's `real_world_deployment.py` and `run_r2r_eval.py`.
_OTHERS = ("attn_pool.", "proprio_proj.")


def open_weights(checkpoint: Path, vocab_padding: int, codebook: int) -> CheckpointWeights:
    """Find every tensor of a checkpoint: safetensors, single or sharded, and the decoder's file.

    Args:
        checkpoint: the folder.
        vocab_padding: rows behind the vocabulary's last id: the padding token's, then the latent
            tokens'.
        codebook: latent tokens.

    Raises:
        CheckpointError: no weights, a missing, truncated or unsafe file, one that would not be
            used, an adapter's, a decoder of another kind, or no room for the latent tokens.
    """
    require_parts_used(checkpoint)
    file = decoder_file(checkpoint)
    weights = open_body(checkpoint).with_part(DECODER, file)
    other = [key for key in weights.shapes if key.removeprefix(f"{DECODER}.").startswith(_OTHERS)]
    if other:
        raise CheckpointError(
            f"{file} stores {other[0].removeprefix(f'{DECODER}.')}, of an action decoder for real "
            "robots or for navigation (attn_pool, proprio_proj), which is not built here; the one "
            "of LIBERO, CALVIN and Bridge is (latent_action_pool, visual_pool, proj)"
        )
    if HEAD not in weights.shapes:
        return weights  # which is said where keys are compared
    first = weights.shapes[HEAD].shape[0] - vocab_padding + 1
    if codebook >= vocab_padding or first < 1:
        raise CheckpointError(
            f"{checkpoint}: {codebook} latent tokens stand behind the padding token in the last "
            f"{vocab_padding} of {weights.shapes[HEAD].shape[0]} rows of the output layer, which "
            "have no room for them; check pad_to_multiple_of of config.json and codebook"
        )
    return weights.with_rows(HEAD, slice(first, first + codebook))
