"""A benchmark for vla-eval's own environment: random pictures, and a file of its actions.

Imported by the harness, by the name in its configuration; `test_vla_eval_harness` reads the file.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult

STEPS = 10
INSTRUCTION = "push the button"


def seen_at(step: int) -> tuple[Any, Any]:
    """Return the picture, uint8 [28, 28, 3], and the state, float64 [4], of a step."""
    generator = np.random.default_rng(step)
    picture = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    return picture, generator.uniform(-1, 1, 4).astype(np.float32).astype(np.float64)


class RecordedBenchmark(StepBenchmark):
    """Counts steps; an episode is solved when all of them were taken."""

    def __init__(self, log: str, steps: int = STEPS, send_state: bool = False) -> None:
        super().__init__()
        self.log, self.steps, self.send_state = Path(log), steps, send_state
        self.count = 0

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": INSTRUCTION, "suite": "recorded"}]

    def reset(self, task: dict[str, Any]) -> int:
        self.count = 0
        self.write({"reset": task["name"], "send_state": self.send_state})
        return 0

    def step(self, action: dict[str, Any]) -> StepResult:
        self.write({"step": self.count, "action": np.asarray(action["actions"]).tolist()})
        self.count += 1
        return StepResult(self.count, 0.0, self.count >= self.steps, {})

    def make_obs(self, raw_obs: int, task: dict[str, Any]) -> dict[str, Any]:
        picture, state = seen_at(raw_obs)
        images = {"images": {"agentview": picture}, "task_description": task["name"]}
        return {**images, "states": state} if self.send_state else images

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": self.count == self.steps}

    def get_hold_action(self, last_action: dict[str, Any] | None) -> dict[str, Any]:
        return {"actions": np.full(4, 7.0, np.float32)}

    def get_metadata(self) -> dict[str, Any]:
        return {"max_steps": 10 * self.steps}

    def write(self, row: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
