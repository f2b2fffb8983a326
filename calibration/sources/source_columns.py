"""Which columns of a recording are cameras, state, action and instruction, whatever its format."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from calibration.sources.lerobot_columns import KeyMap, split_columns
from qvla_export.shared.errors import QvlaError

# What the options have where nobody chose: the format's own usual names.
_NO_CHOICE = KeyMap()
# Folders of observations: LIBERO's and robomimic's, RLDS's, ALOHA's.
_SEEN = ("obs/", "observation/", "observations/")


@dataclass(frozen=True)
class Offer:
    """What a recording has, and what its format usually calls things; paths with slashes."""

    pictures: Sequence[str]
    others: Sequence[str]
    # Usual names, best first; several columns of one are separated by commas.
    states: Sequence[str] = ()
    actions: Sequence[str] = ()
    instructions: Sequence[str] = ()


@dataclass(frozen=True)
class Columns:
    """The columns that are read."""

    # Camera name -> column.
    images: Mapping[str, str]
    state: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    instruction: str | None = None
    # What to do in every frame, whatever the recording says.
    one_instruction: str | None = None


def choose_columns(keys: KeyMap, offer: Offer, source: str) -> Columns:
    """Return the columns of a recording for what is asked for.

    A name may be the last part of a column's path where no other ends alike. A camera that is not
    named has the last part of its column; a state that is not named is the format's usual one.

    Args:
        keys: what the options say.
        offer: what is there.
        source: the recording, as messages name it.

    Raises:
        QvlaError: a column is missing, ambiguous, or of two cameras at once.
    """
    images = {name: _find(column, offer.pictures, source) for name, column in keys.images.items()}
    if not images:
        images = {column.rpartition("/")[2]: column for column in offer.pictures}
        if len(images) < len(offer.pictures):
            raise QvlaError(
                f"{source}: {', '.join(offer.pictures)} would be cameras of one name; "
                "name them with --camera NAME=COLUMN"
            )
    if not images:
        raise QvlaError(f"{source} has no pictures; it has {', '.join(offer.others) or 'nothing'}")
    for column, count in Counter(images.values()).items():
        if count > 1:
            names = [name for name, key in images.items() if key == column]
            raise QvlaError(
                f"cameras {', '.join(names)} would all show column {column}; "
                "give each camera a column of its own with --camera NAME=COLUMN"
            )
    phrases = keys.instruction or _usual(offer.instructions, offer.others)
    return Columns(
        MappingProxyType(images),
        _vectors(keys.state, _NO_CHOICE.state, offer.states, offer, source),
        _vectors(keys.action, _NO_CHOICE.action, offer.actions, offer, source),
        _find(phrases, offer.others, source) if phrases else None,
        keys.one_instruction,
    )


def _vectors(
    name: str | None, usual: str | None, names: Sequence[str], offer: Offer, source: str
) -> tuple[str, ...]:
    columns = _usual(names, offer.others) if name == usual else name
    return tuple(_find(column, offer.others, source) for column in split_columns(columns))


def _usual(names: Sequence[str], present: Sequence[str]) -> str | None:
    """Return the first of the usual names whose columns are all there."""
    ends = {column.rpartition("/")[2] for column in present} | set(present)
    return next((n for n in names if all(c in ends for c in split_columns(n))), None)


def _find(name: str, present: Sequence[str], source: str) -> str:
    ends = [column for column in present if column.endswith(f"/{name}")]
    if name in present:
        return name
    # What was seen, rather than what was commanded or what came next.
    seen = [column for column in ends if column.startswith(_SEEN)]
    ends = seen if len(seen) == 1 else ends
    if len(ends) != 1:
        what = "several columns" if ends else "no column"
        raise QvlaError(
            f"{source} has {what} {name}; it has {', '.join(present) or 'none of that kind'}. Name "
            "columns with --camera NAME=COLUMN, --state-column, --action-column, "
            "--instruction-column"
        )
    return ends[0]
