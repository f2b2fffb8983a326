"""What a checkpoint's config.json does not say, whatever the family."""

from dataclasses import dataclass

from qvla_export.shared.policy_interface import PolicyInterface


@dataclass(frozen=True)
class PrismaticConfig(PolicyInterface):
    """Inputs and vocabulary of a policy on Prismatic's two towers and Llama."""

    # Attention heads of the DINOv2 and SigLIP towers: the one shape weights do not show.
    vision_heads: tuple[int, int] = (16, 16)
    # Llama-2's beginning and empty piece; other vocabularies have others.
    bos_token_id: int = 1
    suffix_token_id: int = 29871
    # Side of the frames after the JPEG + lanczos step of the training data; 0: no such step.
    training_image_size: int = 0
    center_crop: bool = False
