"""A tiny checkpoint of every kind of policy, and observations that it takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from act_cases import act_observations, write_tiny_act
from openvla_cases import openvla_observations, write_tiny_openvla
from pi_cases import pi_observations, write_tiny_pi
from smolvla_cases import smolvla_observations, write_tiny_smolvla
from tiny_policy import TINY_CONFIG, tiny_observations, write_tiny_checkpoint
from univla_cases import write_tiny_univla

from qvla_export.shared.observation import Observation

_DIFFUSION = replace(TINY_CONFIG, head="diffusion", diffusion_train_steps=8, diffusion_steps=4)
_TOKENS = replace(TINY_CONFIG, head="tokens")


@dataclass(frozen=True)
class FamilyCase:
    """What writes a checkpoint into a folder and returns it, and what makes observations."""

    write: Callable[[Path], Path]
    observations: Callable[[int], list[Observation]]


FAMILY_CASES: Mapping[str, FamilyCase] = MappingProxyType(
    {
        "oft": FamilyCase(write_tiny_checkpoint, tiny_observations),
        "diffusion": FamilyCase(
            partial(write_tiny_checkpoint, config=_DIFFUSION), tiny_observations
        ),
        "tokens": FamilyCase(partial(write_tiny_checkpoint, config=_TOKENS), tiny_observations),
        "openvla": FamilyCase(write_tiny_openvla, openvla_observations),
        "univla": FamilyCase(write_tiny_univla, openvla_observations),
        "pi0": FamilyCase(write_tiny_pi, pi_observations),
        "pi05": FamilyCase(partial(write_tiny_pi, adaptive=True), pi_observations),
        "smolvla": FamilyCase(write_tiny_smolvla, smolvla_observations),
        "act": FamilyCase(write_tiny_act, act_observations),
    }
)
