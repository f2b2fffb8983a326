"""The files of an OpenVLA checkpoint folder: those that are read, and those that none reads."""

from pathlib import Path

from qvla_export.policies.prismatic.files import body_files, check_body, require_all_used


def require_body_alone(checkpoint: Path) -> None:
    """Refuse a folder with stored parts that the policy would act without.

    Raises:
        CheckpointError: naming every such file, what it is and what to do.
    """
    require_all_used(checkpoint, body_files(checkpoint), {})


def check_files(checkpoint: Path) -> None:
    """Refuse a folder by its files' names and headers alone; needs no torch.

    Raises:
        CheckpointError: a part that would not be used, a missing or damaged file, weights that
            were quantized elsewhere, or an adapter.
    """
    require_body_alone(checkpoint)
    check_body(checkpoint)
