"""What a recording holds: MCAP with JSON messages, which Foxglove and `mcap` tools read.

    metadata "qvla"      format, source, images, contract, versions; which recording this file
                         belongs to and its place there; written first
    /camera/<name>       foxglove.CompressedImage: one camera's picture, PNG or JPEG
    /observation         qvla.Observation: state, instruction and which cameras belong to it
    /action              qvla.Action: what the policy made of one observation, or why nothing
    /step                qvla.Step: one slot of the control loop (`qvla run`)
    /board               qvla.Board: the board, every few seconds
    metadata "qvla.end"  what was written and what was dropped so far, and how it ended; missing if
                         the recorder was killed

An observation and its pictures share one log time, which no other observation has; an action
names the log time of its observation. Log times are nanoseconds since 1970.
"""

import json
from typing import Any, Literal

from qvla_export.shared.recorded_messages import ACTION, CAMERA, OBSERVATION

Images = Literal["png", "jpeg"]
IMAGES: tuple[Images, ...] = ("png", "jpeg")

STEP = "/step"
BOARD = "/board"

_NUMBER = {"type": "number"}
_NUMBERS = {"type": "array", "items": _NUMBER}
_CHUNK = {"type": "array", "items": _NUMBERS}
_TIME = {
    "type": "object",
    "properties": {"sec": {"type": "integer"}, "nsec": {"type": "integer"}},
}


def _object(title: str, properties: dict[str, Any], required: list[str]) -> bytes:
    return json.dumps(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": title,
            "type": "object",
            "properties": properties,
            "required": required,
        }
    ).encode()


# Topic, or its beginning -> name and JSON Schema of its messages.
SCHEMAS: dict[str, tuple[str, bytes]] = {
    CAMERA: (
        "foxglove.CompressedImage",
        _object(
            "foxglove.CompressedImage",
            {
                "timestamp": _TIME,
                "frame_id": {"type": "string"},
                "data": {"type": "string", "contentEncoding": "base64"},
                "format": {"enum": list(IMAGES)},
            },
            ["frame_id", "data", "format"],
        ),
    ),
    OBSERVATION: (
        "qvla.Observation",
        _object(
            "qvla.Observation",
            {
                "cameras": {"type": "array", "items": {"type": "string"}},
                "instruction": {"type": "string"},
                "state": _NUMBERS,
                "dropped": {
                    "type": "integer",
                    "description": "events that were not recorded so far",
                },
            },
            ["cameras", "instruction", "state"],
        ),
    ),
    ACTION: (
        "qvla.Action",
        _object(
            "qvla.Action",
            {
                "observation_ns": {
                    "type": ["integer", "null"],
                    "description": "log time of the observation; null where it was unreadable",
                },
                "actions": {**_CHUNK, "description": "robot's units [horizon, dim]"},
                "normalized": {**_CHUNK, "description": "before un-normalization [horizon, dim]"},
                "timing_ms": {"type": "object", "additionalProperties": _NUMBER},
                "error": {"type": "string", "description": "empty where there are actions"},
            },
            ["observation_ns", "actions", "timing_ms", "error"],
        ),
    ),
    STEP: (
        "qvla.Step",
        _object(
            "qvla.Step",
            {
                "slot": {"type": "integer"},
                "state": {"type": "string"},
                "action": {"type": ["array", "null"], "items": _NUMBER},
                "age_ms": {"type": ["number", "null"]},
                "late_ms": {"type": ["number", "null"]},
                "infer_ms": {"type": ["number", "null"]},
                "clamped": {"type": "integer"},
                "events": {"type": "array", "items": {"type": "string"}},
            },
            ["slot", "state"],
        ),
    ),
    BOARD: ("qvla.Board", _object("qvla.Board", {"model": {"type": "string"}}, ["model"])),
}
