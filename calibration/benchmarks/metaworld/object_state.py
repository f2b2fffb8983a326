"""Object state in place of a picture: where things are, in numbers, as the patches of an image.

No picture is drawn. A policy that takes images takes this one as it takes any other, each of its
patches a token; nothing between simulator and engine needs to know of it.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

# Name of the camera that stands for it.
OBJECT_STATE: Final = "object_state"
# Side of the image and of a patch, pixels.
IMAGE_SIZE, PATCH_SIZE = 4, 2

# A patch's pixels, one after another: what lies this far away (metres, along an axis) has a full
# colour. The finest step is a fifth of a millimetre.
_REACHES = np.array([0.6, 0.2, 0.07, 0.025])
_MIDDLE = 127.5
# Where Meta-World's full state keeps the hand, its gripper's opening and the positions of up to two
# things.
HAND, GRIPPER, FIRST, SECOND = slice(0, 3), 3, slice(4, 7), slice(11, 14)
# Numbers from there to where it keeps the same of one simulator step before.
BEFORE = 18


def encode_object_state(
    full_state: NDArray[np.float64], goal: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Return the image of where things are.

    Its four patches are the way from the hand to the first thing, to the second (none where a
    scene has one), to the goal, and from the first thing to the goal. A patch's four pixels are
    that vector at four scales, its x, y and z as red, green and blue.

    Args:
        full_state: Meta-World's, metres.  float64 [39]
        goal: where the goal was put, metres.  float64 [3]

    Returns:
        uint8 [4, 4, 3]
    """
    hand, first, second = full_state[HAND], full_state[FIRST], full_state[SECOND]
    to_second = second - hand if second.any() else np.zeros(3)
    tokens = np.stack([first - hand, to_second, goal - hand, goal - first])
    scaled = np.clip(tokens[:, None] / _REACHES[:, None], -1.0, 1.0)
    pixels = np.rint(_MIDDLE + _MIDDLE * scaled).astype(np.uint8)
    # [token row, column, pixel row, column, xyz] -> rows of pixels.
    patches = pixels.reshape(2, 2, PATCH_SIZE, PATCH_SIZE, 3).transpose(0, 2, 1, 3, 4)
    image: NDArray[np.uint8] = patches.reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
    return image


def add_to_things(
    full_state: NDArray[np.float64], goal: NDArray[np.float64], errors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return full state and goal with errors of first thing, second thing and goal added.

    A thing that is not there stays away.

    Args:
        full_state: float64 [39].
        goal: float64 [3].
        errors: metres.  float64 [3, 3]
    """
    shown = full_state.copy()
    for thing, error in ((FIRST, errors[0]), (SECOND, errors[1])):
        if full_state[thing].any():
            shown[thing] += error
            shown[thing.start + BEFORE : thing.stop + BEFORE] += error
    return shown, goal + errors[2]


def with_second(
    full_state: NDArray[np.float64], position: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return a full state with a second thing that lies still.

    Args:
        full_state: float64 [39].
        position: metres.  float64 [3]
    """
    shown = full_state.copy()
    shown[SECOND] = shown[SECOND.start + BEFORE : SECOND.stop + BEFORE] = position
    return shown
