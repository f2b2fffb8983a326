"""Where the checkout, the tests' data and the shipped policy lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
HELPERS = ROOT / "tests" / "helpers"
REFERENCE = ROOT / "checkpoints" / "reference"
