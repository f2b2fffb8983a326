"""Packages of published networks, small and random: a language model in a GGUF file as is read."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_tower import install_tiny_tower
from tokenizers import pre_tokenizers

from qvla_export.policies import families
from qvla_export.policies.backbones.gguf_file import F32, Q4_1, Q8_0
from qvla_export.policies.backbones.pictures import PictureBackbone
from qvla_export.policies.backbones.texts import TextBackbone
from qvla_export.policies.package_file import PackageFile
from qvla_export.shared.artifacts import sha256_file

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, TOKENS = 64, 96, 2, 4, 2, 24
MERGES = ("Ġ t", "h e", "Ġt he")
WORDS = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES))
Floats = NDArray[np.float32]


def install_tiny_backbones(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Floats]:
    """Write both packages, and make "pictures" and "texts" the known backbones.

    Returns:
        The language model's weights by transformers' names.
    """
    tower = install_tiny_tower(folder, patch)
    package = folder / "tiny_llama"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('nobody needs to run this')\n")
    weights = tiny_llama()
    stored = {name: stored_rows(name, rows) for name, rows in weights.items()}
    (package / "model.gguf").write_bytes(gguf_bytes(stored))
    file = PackageFile(
        "tiny-llama", "1.0", "tiny_llama", "model.gguf", sha256_file(package / "model.gguf")
    )
    known = (PictureBackbone("pictures", tower, 28), TextBackbone("texts", file, TOKENS))
    patch.setattr(families, "BACKBONES", {backbone.name: backbone for backbone in known})
    return {name: rows for name, (rows, _) in stored.items()}


def tiny_llama() -> dict[str, Floats]:
    random = np.random.default_rng(0)
    key_width = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_width, HIDDEN),
        "self_attn.v_proj": (key_width, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }
    weights = {"embed_tokens.weight": random.normal(0, 1, (len(WORDS), HIDDEN))}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            spread = 2 / np.sqrt(shape[1])
            weights[f"layers.{layer}.{name}.weight"] = random.normal(0, spread, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{layer}.{name}.weight"] = random.uniform(0.5, 2, HIDDEN)
    weights["norm.weight"] = random.uniform(0.5, 2, HIDDEN)
    return {name: rows.astype(np.float32) for name, rows in weights.items()}


def stored_rows(name: str, rows: Floats) -> tuple[Floats, tuple[int, bytes]]:
    """Return what is left of rows once they are stored, and (type, bytes) of them."""
    if rows.ndim == 1:
        return rows, (F32, rows.tobytes())
    ordered = _rotated(name, rows)
    blocks = ordered.reshape(-1, 32)
    if name.startswith("embed"):
        steps = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
        codes = np.rint(blocks / steps).astype(np.int8)
        data = b"".join(s.tobytes() + c.tobytes() for s, c in zip(steps, codes, strict=True))
        values, kind = codes * steps.astype(np.float32), Q8_0
    else:
        least = blocks.min(axis=1, keepdims=True).astype(np.float16)
        steps = ((blocks.max(axis=1, keepdims=True) - least) / 15).astype(np.float16)
        codes = np.clip(np.rint((blocks - least) / steps), 0, 15).astype(np.uint8)
        packed = codes[:, :16] | codes[:, 16:] << 4
        data = b"".join(
            s.tobytes() + m.tobytes() + c.tobytes()
            for s, m, c in zip(steps, least, packed, strict=True)
        )
        values, kind = codes * steps.astype(np.float32) + least.astype(np.float32), Q4_1
    return _straight(name, values.reshape(rows.shape)), (kind, data)


def _heads(name: str) -> int:
    return {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)


def _rotated(name: str, rows: Floats) -> Floats:
    """Order rows as llama.cpp's convert_hf_to_gguf.py does: its `permute`."""
    if not (heads := _heads(name)):
        return rows
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _straight(name: str, rows: Floats) -> Floats:
    """Find every row's place again by ordering their numbers in the same way."""
    if not _heads(name):
        return rows
    numbers = np.arange(len(rows), dtype=np.float32)[:, None]
    places = _rotated(name, numbers)[:, 0].astype(int)
    straight = np.empty_like(rows)
    straight[places] = rows
    return straight


def gguf_bytes(stored: Mapping[str, tuple[Floats, tuple[int, bytes]]]) -> bytes:
    """Write version 3: metadata, where tensors are, tensors at multiples of 32 bytes."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(WORDS),
        "tokenizer.ggml.tokens": list(WORDS),
        "tokenizer.ggml.merges": list(MERGES),
    }
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(stored), len(metadata))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    place, body = 0, b""
    for name, (rows, (kind, data)) in stored.items():
        shape = rows.shape[::-1]
        head += _text(_llama_cpp_name(name)) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", kind, place)
        body += data + bytes(-len(data) % 32)
        place = len(body)
    return head + bytes(-len(head) % 32) + body


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)


def _llama_cpp_name(name: str) -> str:
    outside = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name]
    _, layer, rest = name.split(".", 2)
    named = {
        "self_attn.q_proj.weight": "attn_q",
        "self_attn.k_proj.weight": "attn_k",
        "self_attn.v_proj.weight": "attn_v",
        "self_attn.o_proj.weight": "attn_output",
        "mlp.gate_proj.weight": "ffn_gate",
        "mlp.up_proj.weight": "ffn_up",
        "mlp.down_proj.weight": "ffn_down",
        "input_layernorm.weight": "attn_norm",
        "post_attention_layernorm.weight": "ffn_norm",
    }
    return f"blk.{layer}.{named[rest]}.weight"
