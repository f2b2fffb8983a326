"""Quantize a policy to 4 bits, see what that does to its actions, and act with the result.

    python examples/quantize_policy.py --run runs/example

The shipped reference policy and simulated demonstrations stand in for yours; with your own, name
the checkpoint's preset and draw the observations from your data set:

    policy = qvla.load_policy("my/checkpoint", preset="libero")
    observations = qvla.CalibrationSet.from_dataset(
        "my/lerobot", cameras={"full_image": "observation.images.image"}, count=64
    )
"""

import argparse
from pathlib import Path

import qvla_export as qvla

REFERENCE = Path(__file__).parents[1] / "checkpoints" / "reference"


def main() -> None:
    """Run the example; a second run keeps what the first one made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/example", help="folder to write")
    parser.add_argument("--count", type=int, default=8, help="observations to measure on")
    options = parser.parse_args()

    policy = qvla.load_policy(REFERENCE)
    observations = qvla.CalibrationSet.from_simulator(count=options.count, held_out=8)
    result = qvla.quantize(
        policy, observations, bits=4, target="cpu", run=options.run, on_progress=tell
    )
    print(result.sensitivities)
    print(result.plan)
    print(result.bundle)
    print(result.action_error)
    with qvla.open_bundle(result.bundle) as robot:
        chunk = robot.infer(observations.held_out[0])
    print(chunk)


def tell(progress: qvla.Progress) -> None:
    """Print one line when a step begins and one when it ends."""
    if progress.state != "running":
        print(f"step {progress.step} of {progress.steps}: {progress.work} {progress.state}")


if __name__ == "__main__":
    main()
