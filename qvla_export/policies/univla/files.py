"""The files of a UniVLA checkpoint folder: those that are read, and those that none reads."""

from collections.abc import Mapping
from pathlib import Path

from qvla_export.policies.prismatic.files import body_files, check_body, require_all_used
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.policy_interface import LATENT_DECODER

# The action decoder's name in files and among parameters.
DECODER = "action_decoder"
# Pattern -> what such a file is, and what to do with it.
_UNUSED: Mapping[str, str] = {
    "*latent_action_model*": "what made the latent tokens in training; move it out of the folder",
    "*lam*.ckpt": "what made the latent tokens in training; move it out of the folder",
}


def decoder_file(checkpoint: Path) -> Path:
    """Return the only `action_decoder*.pt` of a checkpoint.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    files = sorted(checkpoint.glob(LATENT_DECODER))
    if len(files) != 1:
        raise CheckpointError(
            f"{checkpoint} must hold exactly one {LATENT_DECODER}, found {[p.name for p in files]}"
        )
    return files[0]


def require_parts_used(checkpoint: Path) -> None:
    """Refuse a folder with stored parts that the policy would act without.

    Raises:
        CheckpointError: naming every such file, what it is and what to do.
    """
    require_all_used(checkpoint, {*body_files(checkpoint), decoder_file(checkpoint)}, _UNUSED)


def check_files(checkpoint: Path) -> None:
    """Refuse a folder by its files' names and headers alone; needs no torch.

    Raises:
        CheckpointError: a part that would not be used, a missing or damaged file, weights that
            were quantized elsewhere, or an adapter.
    """
    require_parts_used(checkpoint)
    check_body(checkpoint)
