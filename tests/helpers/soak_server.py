"""A server in a process of its own for the soak: its policy says which request it answers."""

import logging

import numpy as np

from jetson.server import serve
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

CONTRACT = PolicyContract(("image", "wrist_image"), 2, 3, 2, "soak")


class NumberedPolicy:
    """Acts with the numbers of the state, which are the client's and the request's."""

    contract = CONTRACT

    def infer(self, observation: Observation) -> ActionChunk:
        if observation.instruction == "fail":
            raise RuntimeError("an engine that fails now and then")
        actions = np.zeros((CONTRACT.horizon, CONTRACT.action_dim), np.float32)
        actions[:, :2] = observation.state
        return ActionChunk(actions, actions)


def run(port: int, gr00t_port: int) -> None:
    logging.disable(logging.CRITICAL)  # each disconnect and failure is logged, as it should be
    serve(NumberedPolicy(), ServerSettings(port=port, gr00t_port=gr00t_port, max_rate_hz=0.0))
