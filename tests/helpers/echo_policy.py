"""A policy that says what it saw, and requests for it; shared by the server's tests."""

import threading
import time
from typing import Any

import json_numpy
import numpy as np
import requests

from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

IMAGE = np.arange(16 * 20 * 3, dtype=np.uint8).reshape(16, 20, 3)
OPENVLA = PolicyContract(("image",), 4, 7, 0, "tiny", "d1gest", "cpu")
OFT = PolicyContract(("front", "hand"), 4, 7, 8, "tiny")


class EchoPolicy:
    """Acts on what it sees: the action's first number is the first pixel of the first camera."""

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = contract
        self.together = 0
        self.most_together = 0

    def infer(self, observation: Observation) -> ActionChunk:
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        time.sleep(0.001)  # long enough for a second inference to be seen beside this one
        actions = np.zeros((self.contract.horizon, self.contract.action_dim), np.float32)
        actions[:, 0] = observation.images[self.contract.cameras[0]][0, 0, 0]
        actions[:, 1] = np.arange(self.contract.horizon)
        if observation.instruction == "fail":
            raise RuntimeError("the engine is on fire")
        if observation.instruction == "nan":
            actions[2, 3] = np.nan
        if observation.instruction == "short":
            actions = actions[:1]
        self.together -= 1
        return ActionChunk(actions, actions, {"preprocess": 0.25, "engine": 1.5})


class GatedPolicy(EchoPolicy):
    """Acts once a test opens the gate, and says that it was asked to."""

    def __init__(self, contract: PolicyContract = OFT) -> None:
        super().__init__(contract)
        self.acting, self.gate = threading.Event(), threading.Event()

    def infer(self, observation: Observation) -> ActionChunk:
        self.acting.set()
        self.gate.wait(20)
        return super().infer(observation)


def oft_fields(**changes: Any) -> dict[str, Any]:
    fields = {
        "full_image": IMAGE,
        "wrist_image": IMAGE + 1,
        "state": np.zeros(8),
        "instruction": "push",
    }
    return {k: v for k, v in {**fields, **changes}.items() if v is not None}


def post(url: str, fields: dict[str, Any], **options: Any) -> requests.Response:
    return requests.post(url + "/act", data=json_numpy.dumps(fields), timeout=20, **options)
