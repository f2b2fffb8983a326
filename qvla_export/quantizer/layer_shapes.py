"""Shapes of layers by name, and how those of a policy differ from a plan's. numpy only."""

import difflib
from collections.abc import Mapping

# Layer name -> (channels, weights of one channel).
LayerShapes = Mapping[str, tuple[int, int]]


def shape_problem(plan: LayerShapes, policy: LayerShapes) -> str | None:
    """Say how a policy's layers differ from a plan's; None where they do not."""
    for owner, other, names, known in (
        ("plan", "policy", plan, policy),
        ("policy", "plan", policy, plan),
    ):
        missing = [name for name in names if name not in known]
        if missing:
            nearest = difflib.get_close_matches(missing[0], known, n=1, cutoff=0.0)
            return (
                f"{len(missing)} layers of the {owner} are not in the {other}, first "
                f"{missing[0]!r}; the {other}'s nearest is {nearest}"
            )
    for name, (channels, inputs) in policy.items():
        if plan[name] != (channels, inputs):
            return (
                f"layer {name!r} has {channels} channels of {inputs} weights in the policy, "
                f"{plan[name][0]} of {plan[name][1]} in the plan"
            )
    return None
