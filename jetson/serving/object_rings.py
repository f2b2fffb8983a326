"""When Python looks for objects that hold each other, in a process that serves for days.

Every connection leaves such a ring: asyncio's transport holds its own methods, uvicorn's protocol
its tasks, an exception its frames. Python frees rings in collections; the full one, which alone
finds what outlived two others, waits until a quarter as much was added as there is in all, here
tens of thousands of objects of imported modules. Until then a minute of peers that come and go
holds megabytes, and leaves heaps that are never whole again.
"""

import contextlib
import gc
from collections.abc import Iterator

# Objects more than before that a collection of the youngest follows, collections of the youngest
# that one of the middle follows, and of the middle that a full one follows; Python's: 700, 10, 10.
_THRESHOLDS = (700, 5, 2)


@contextlib.contextmanager
def rings_collected_early() -> Iterator[None]:
    """Free what holds itself soon, for the duration of a block; to be entered after warm-up.

    What is there by then is taken for lasting and not looked at again, so that a full collection
    takes no longer than what came since: also a good client's reply waits less for one.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    # Counts anew what a quarter is of.
    gc.collect()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
