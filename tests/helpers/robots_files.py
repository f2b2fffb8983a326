"""A file of two robots, as a fleet is named."""

from pathlib import Path

FLEET = """
repository = "."
[defaults]
user = "qvla"
proven_within_s = 60
[groups.line-a]
port = 2222
command = "sudo -n '/opt/my qvla'"
[robots.arm-01]
host = "10.0.0.11"
[robots.arm-02]
group = "line-a"
store = "/srv/a b"
target = "cpu"
healthy = "checked"
"""


def robots_file(folder: Path, text: str = FLEET) -> Path:
    """Write robots.toml."""
    path = folder / "robots.toml"
    path.write_text(text)
    return path
