"""Names of layers for readers: which module a layer is part of, and a label that fits an axis."""

import re

# Policy's module -> what readers call it; the first pattern that is found decides.
_TOWERS = (
    (re.compile(r"(^|\.)fused_featurizer\."), "SigLIP"),
    (re.compile(r"(^|\.)featurizer\."), "DINOv2"),
    (re.compile(r"(^|\.)(vision_tower|vision_model)\."), "Vision"),
    (re.compile(r"(expert)"), "Action expert"),
    (re.compile(r"(^|\.)(language_model|llm_backbone)\."), "Language"),
)
_PARTS = (
    (re.compile(r"\.(attention|self_attn|attn)\."), "attention"),
    (re.compile(r"\.mlp\."), "MLP"),
    (re.compile(r"patch_embed"), "patches"),
)
_BLOCK = re.compile(r"\.(\d+)\.")


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
