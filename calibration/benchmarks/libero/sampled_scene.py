"""Where everything was at the moment that an observation is of, kept to be drawn later."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# What MuJoCo draws from, beside the model.
_PLACES: Final = (
    *("xpos", "xquat", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)


class SampledScene:
    """A robosuite scene at the moment its observation was sampled.

    robosuite samples what is observed, pictures too, once amid a control step, before the step is
    over: the policy of LIBERO's own evaluation is shown that moment. Drawing there takes ten times
    as long as the step; noting where things are takes nothing, and is drawn when somebody looks.
    """

    def __init__(self, environment: Any) -> None:
        """Note places from now on, whenever the environment samples what it observes.

        Args:
            environment: robosuite's, with an offscreen renderer; its resets keep the model.
        """
        from robosuite.utils.observables import Observable, sensor

        self._sim = environment.sim
        self._places = type(self._sim.data)(self._sim.model)

        # A function: robosuite notes the modality on it, which a method does not allow.
        def note(observed: dict[str, Any]) -> NDArray[np.float64]:
            self._note()
            return np.zeros(1)  # an observable has a value

        sensed = sensor(modality="scene")(note)
        environment.add_observable(
            Observable("sampled_scene", sensed, sampling_rate=environment.control_freq)
        )

    def draw(self, camera: str, size: int) -> NDArray[np.uint8]:
        """Return the picture of a camera, rows from below as OpenGL has them.

        uint8 [size, size, 3]
        """
        context = self._sim._render_context_offscreen
        now, context.data = context.data, self._places
        try:
            drawn: NDArray[np.uint8] = self._sim.render(camera_name=camera, width=size, height=size)
        finally:
            context.data = now
        return drawn

    def _note(self) -> None:
        for name in _PLACES:
            getattr(self._places, name)[:] = getattr(self._sim.data, name)
