"""What measuring a policy takes that is in memory as a whole."""

from qvla_export.measurement.layer_groups import NeedsOf
from qvla_export.measurement.part_needs import part_needs
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import traced_layers


def whole_bytes(policy: Policy, batch_size: int) -> int:
    """Return the bytes of all weights as float32 and of a batch's activations with a graph.

    Args:
        policy: its weights were left on disk.
        batch_size: observations that run together.
    """
    return _weights_and_pass(policy, batch_size)[0]


def room_beside_whole(
    policy: Policy, batch_size: int, needs_of: NeedsOf, held_bytes: int, max_bytes: int
) -> int | None:
    """Return what a bound leaves for layers if the policy is in memory as a whole.

    None: not enough for the one that needs most; the policy has to be streamed.

    Args:
        policy: its weights were left on disk.
        batch_size: observations that run together.
        needs_of: layers and how many numbers a pass moves -> what each layer needs.
        held_bytes: sums and whatever else stays in memory.
        max_bytes: the bound.
    """
    taken, moved = _weights_and_pass(policy, batch_size)
    room = max_bytes - taken - held_bytes
    needs = needs_of(traced_layers(policy), moved)
    return room if room >= max(need.nbytes() for need in needs.values()) else None


def _weights_and_pass(policy: Policy, batch_size: int) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return the bytes, and how many numbers a batch moves through each layer."""
    parts = policy.parts(1)
    outputs = {part.output for part in parts}
    feeds = {n: t for part in parts for n, t in part.inputs.items() if n not in outputs}
    needs = part_needs(policy, traced_layers(policy), feeds)
    weights = 4 * sum(tensor.numel() for tensor in policy.module.state_dict().values())
    passed = sum(n.made_bytes for n in needs) + max(n.pass_bytes - n.made_bytes for n in needs)
    moved = {
        name: (batch_size * numbers_in, batch_size * numbers_out)
        for n in needs
        for name, (numbers_in, numbers_out) in n.moved.items()
    }
    return weights + batch_size * passed, moved
