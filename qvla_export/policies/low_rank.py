"""Low-rank adapters (LoRA, arXiv 2106.09685) as peft stores them: what each adds to a weight.

Keys are peft's. In a network's own state they are `X.base_layer.weight`, `X.lora_A.default.weight`
and `X.lora_B.default.weight`; in an adapter's file they stand behind `base_model.model.`, without
the adapter's name.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.json_documents import FOREIGN, read_json

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_(A|B)\.(?:\w+\.)?weight$")
# Factors of what is not a low-rank change of a matrix, and copies of whole modules.
_OTHERS = ("lora_embedding_", "lora_magnitude_vector", "lora_A.", "lora_B.", ".modules_to_save.")
# Ways to begin that leave the base model's weights as they are; others (PiSSA, OLoRA) change them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterSettings:
    """What decides how much an adapter adds."""

    alpha: float
    # Divided by the square root of the rank instead of the rank (arXiv 2312.03732).
    rank_stabilized: bool = False

    def scale(self, rank: int) -> float:
        """Return what the product of two factors is multiplied by."""
        return self.alpha / (rank**0.5 if self.rank_stabilized else rank)


@dataclass(frozen=True)
class Factors:
    """Stored keys of what is added to one weight: B A, times a scale."""

    a: str
    b: str


@dataclass(frozen=True)
class SplitKeys:
    """The stored keys of a network that peft has wrapped."""

    # Network's key -> stored key of the weight itself.
    weights: Mapping[str, str]
    # Network's key -> its factors.
    factors: Mapping[str, Factors]


def split_keys(keys: Iterable[str], place: Path) -> SplitKeys:
    """Tell weights from low-rank factors; where there are none, every key is a weight's.

    Raises:
        CheckpointError: naming a key of an adapter that is no plain pair of factors.
    """
    weights: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        plain = key.removeprefix(_PREFIX)
        if match := _FACTOR.search(plain):
            found.setdefault(f"{plain[: match.start()]}.weight", {})[match[1]] = key
        elif other := next((part for part in _OTHERS if part in plain), None):
            raise CheckpointError(
                f"{place} stores {key}: {other.strip('._')} is of a kind of adapter that is not "
                "merged here (DoRA, embeddings, biases, whole modules); merge it with peft's "
                "merge_and_unload and name the merged folder"
            )
        else:
            weights[plain.replace(".base_layer.", ".")] = key
    lone = sorted(name for name, pair in found.items() if len(pair) != 2)
    if lone:
        raise CheckpointError(f"{place} stores one low-rank factor alone of {lone[0]}")
    return SplitKeys(weights, {name: Factors(pair["A"], pair["B"]) for name, pair in found.items()})


def require_fitting(
    place: Path,
    key: str,
    weight: tuple[int, ...] | None,
    factors: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Refuse factors A [rank, inputs] and B [outputs, rank] of no weight [outputs, inputs].

    Raises:
        CheckpointError: naming the weight and all shapes.
    """
    a, b = factors
    fits = len(a) == len(b) == 2 and a[0] == b[1] and weight == (b[0], a[1])
    if not fits:
        has = "there is none" if weight is None else f"it is {list(weight)}"
        raise CheckpointError(
            f"{place} stores low-rank factors {list(a)} and {list(b)} of {key}, but {has}; is this "
            "the base that the adapter was trained on?"
        )


def read_settings(config: Path) -> AdapterSettings:
    """Read peft's `adapter_config.json`.

    Raises:
        CheckpointError: an adapter of a kind that is not merged here; the message names it.
        ArtifactError: it is not JSON.
    """
    value = read_json(config, "adapter configuration", FOREIGN)
    if not isinstance(value, dict):
        raise CheckpointError(f"{config} is no adapter configuration: it is no JSON object")
    for name, (is_plain, kind) in _PLAIN.items():
        if name in value and not is_plain(value[name]):
            raise CheckpointError(
                f"{config}: {name} is {value[name]!r:.80}: {kind} is not merged here; merge it "
                "with peft's merge_and_unload and name the merged folder"
            )
    alpha = value.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise CheckpointError(f"{config}: lora_alpha must be a number above 0, got {alpha!r}")
    stabilized = value.get("use_rslora", False)
    if stabilized not in (None, True, False):
        raise CheckpointError(f"{config}: use_rslora must be true or false, got {stabilized!r:.80}")
    return AdapterSettings(float(alpha), bool(stabilized))


def _is_off(value: Any) -> bool:
    return not value


# Field -> (which values are plain LoRA's, what others are).
_PLAIN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "an adapter that is no LoRA"),
    "use_dora": (_is_off, "DoRA"),
    "fan_in_fan_out": (_is_off, "a transposed weight"),
    "alpha_pattern": (_is_off, "an alpha of its own for some layers"),
    "layer_replication": (_is_off, "a network with repeated layers"),
    "modules_to_save": (_is_off, "a copy of whole modules"),
    "lora_bias": (_is_off, "a bias of factors"),
    "bias": (lambda value: value in (None, "none"), "an adapter that trains biases"),
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "lora_ga_config",
            "megatron_config",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        ),
        (_is_off, "an adapter that is more than a product of two factors"),
    ),
    "init_lora_weights": (lambda value: value in _PLAIN_STARTS, "one that changes its base"),
}
