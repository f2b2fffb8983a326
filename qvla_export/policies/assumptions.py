"""What a checkpoint was found to be and what is assumed of it, in one line for people."""

from collections.abc import Collection, Mapping

from qvla_export.shared.policy_interface import PolicyInterface


def unstated_fields(config: PolicyInterface, stated: Collection[str]) -> dict[str, object]:
    """Return the fields of a configuration that no file says, with the values they have.

    Args:
        config: what holds of a checkpoint.
        stated: names of the fields that its files say.

    Returns:
        Name -> value; what is empty or None assumes nothing and is left out.
    """
    return {
        name: value
        for name, value in vars(config).items()
        if name not in stated and value not in ((), None)
    }


def with_assumptions(what: str, assumptions: Mapping[str, object]) -> str:
    """Return what a checkpoint is, followed by every assumed field with its value, if any."""
    fields = ", ".join(f"{name} {_shown(value)}" for name, value in assumptions.items())
    return f"{what}; assumed: {fields}" if fields else what


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value)) or "none"
    # A text with spaces or line ends is quoted: the line must stay one, and its fields apart.
    plain = not isinstance(value, str) or value.replace("-", "_").isidentifier()
    return str(value) if plain else repr(value)
