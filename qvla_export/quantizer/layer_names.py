"""All that a layer's name says: its module, a label for readers, and which layers belong together.

The one place that reads names; a family with other names adds its own here.
"""

import re

# Policy's module -> what readers call it; the first pattern that is found decides.
_TOWERS = (
    (re.compile(r"(^|\.)fused_featurizer\."), "SigLIP"),
    (re.compile(r"(^|\.)featurizer\."), "DINOv2"),
    (re.compile(r"(^|\.)(vision_tower|vision_model)\."), "Vision"),
    (re.compile(r"(expert)"), "Action expert"),
    (re.compile(r"(^|\.)(language_model|llm_backbone)\."), "Language"),
    (re.compile(r"^backbone\."), "ResNet"),
    (re.compile(r"^encoder\."), "Encoder"),
    (re.compile(r"^decoder\."), "Decoder"),
)
_PARTS = (
    (re.compile(r"\.(attention|self_attn|multihead_attn|attn)\."), "attention"),
    (re.compile(r"\.(mlp\.|linear[12]$)"), "MLP"),
    (re.compile(r"patch_embed"), "patches"),
    (re.compile(r"\.(conv\d|downsample\.0)$"), "convolutions"),
)
_BLOCK = re.compile(r"\.(\d+)\.")
# Last names of an MLP's producers and its consumer.
_MLPS = ((("fc1",), "fc2"), (("linear1",), "linear2"), (("gate_proj", "up_proj"), "down_proj"))
# Last names of layers that share an input and become one.
_PARALLEL = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# What is never quantized -> the name it is known by; the first pattern that is found decides.
_KEPT = (
    (re.compile(r"\.dense$"), "adaptive norm"),
    (re.compile(r"time_mlp"), "time MLP"),
    (re.compile(r"^(state_proj$|proprio_projector\.|encoder_robot_state)"), "state projection"),
    (re.compile(r"^(action_in_proj$|noisy_action_projector\.)"), "action projection"),
    (
        re.compile(r"^(action_out_proj$|action_head(\..*fc2)?$|action_decoder\.proj\.)"),
        "last projection",
    ),
    (re.compile(r"^(action_head|action_decoder)\."), "action head"),
    (re.compile(r"lm_head$"), "output layer"),
    (re.compile(r"^film\."), "FiLM"),
    (re.compile(r"(projector|^connector$|img_feat_input_proj$)"), "projector"),
)
_CARRIER = "VLAQuantBench (arXiv 2609.25376) names its like as a carrier of failure"
# Such a name -> why the layer stays in 16 bits.
WHY_KEPT = {
    "adaptive norm": f"{_CARRIER}; it scales all that the expert computes",
    "time MLP": f"{_CARRIER}; one vector for all positions",
    "state projection": f"{_CARRIER}; few weights on numbers without redundancy",
    "action projection": f"{_CARRIER}; few weights on numbers without redundancy",
    "last projection": f"{_CARRIER}; its error is the action's",
    "action head": "the paper's exclusion",
    "output layer": "the paper's exclusion; its rows are the actions",
    "FiLM": "it scales all that a tower's block computes",
    "projector": "the paper's exclusion; all that is seen passes it",
    "other": "it is of no tower, language model or expert",
}


def kept_kind_of(layer: str) -> str:
    """Return what a layer that is never quantized is known by: a key of `WHY_KEPT`."""
    return next((name for pattern, name in _KEPT if pattern.search(layer)), "other")


def module_of(layer: str) -> str:
    """Return the module of a layer, for example "SigLIP attention".

    A layer of a policy family unknown here is in the module of its first two names.
    """
    part = next((name for pattern, name in _PARTS if pattern.search(layer)), "other")
    known = any(pattern.search(layer) for pattern, _ in _TOWERS)
    return f"{tower_of(layer)} {part}" if known else tower_of(layer)


def tower_of(layer: str) -> str:
    """Return the tower of a layer, for example "SigLIP"; the first two names where unknown."""
    found = (name for pattern, name in _TOWERS if pattern.search(layer))
    return next(found, ".".join(layer.split(".")[:2]))


def label_of(layer: str) -> str:
    """Return a short label, for example "SigLIP 3 fc1"."""
    tower = next((name for pattern, name in _TOWERS if pattern.search(layer)), "")
    block = _BLOCK.search(layer)
    words = [tower, block[1] if block else "", layer.rsplit(".", 1)[-1].removesuffix("_proj")]
    return " ".join(word for word in words if word)


def mlp_producers(layer: str) -> tuple[str, ...] | None:
    """Return the layers that make an MLP's hidden units where a layer consumes them, else None."""
    parent, _, last = layer.rpartition(".")
    for producers, consumer in _MLPS:
        if last == consumer:
            return tuple(f"{parent}.{name}" for name in producers)
    return None


def parallel_group(layer: str) -> str:
    """Return a name that layers of one parent share which run as one product; else its own.

    See `qvla_export.graph.passes.merge`.
    """
    parent, _, last = layer.rpartition(".")
    for members in _PARALLEL:
        if last in members:
            return f"{parent}.{'+'.join(members)}"
    return layer
