"""Serve a bundle over HTTP and act through it, as a robot's program would.

    python examples/serve_bundle.py runs/example/settings/w4/bundle

On the robot the two halves are two processes: `qvla serve BUNDLE` and your control program.
"""

import sys

import qvla_export as qvla


def main(bundle: str) -> None:
    """Serve on a free port of this machine, act once, stop."""
    with (
        qvla.open_bundle(bundle) as robot,
        qvla.open_server(robot, qvla.ServerSettings(port=0)) as url,
        qvla.RemotePolicy(url) as remote,
    ):
        # What the policy sees: its cameras, state and instruction. Yours come from a robot.
        chunk = remote.infer(remote.contract.blank_observation())
    print(f"{url}: {chunk}")
    print(chunk.actions)


if __name__ == "__main__":
    main(sys.argv[1])
