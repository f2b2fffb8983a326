"""Pictures of a scene: two cameras, cheap to draw, and what a shift changes of its looks."""

import atexit
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.shifts import Shift
from calibration.benchmarks.rendering import choose_renderer
from qvla_export.shared.errors import QvlaError

# Before anybody imports mujoco: we, metaworld or gymnasium.
choose_renderer()

PACKAGES = "libegl1 libgl1 libgles2 libegl-mesa0 libosmesa6"

# Links that cost most of the vertices and would only hide what the hand does.
_ARM = "right_arm_base_link right_l0 right_l1 right_l1_2 right_l2 right_l2_2 right_l3 right_l4 "
_ARM += "right_l4_2 right_l5 right_l6"
_STAND = "controller_box pedestal_feet pedestal torso head screen"
_HIDDEN_BODIES = frozenset(_ARM.split()) | frozenset(_STAND.split())
_HIDDEN_GROUP = 5
_VISIBLE_GROUPS = (1, 1, 0, 0, 0, 0)

# Of a grade of 1: the camera's shift in metres, its turn in degrees, its share of the distance.
_CAMERA_M, _CAMERA_DEG, _CAMERA_SHARE = 0.012, 1.5, 0.02
# Light and colours are multiplied by e to the power of so much times a draw.
_LIGHT, _COLOUR = 0.2, 0.15
# What of a model a shift of looks changes.
_LOOKS = ("geom_rgba", "mat_rgba", "mat_texid", "light_diffuse", "light_ambient")
_HEADLIGHT = ("ambient", "diffuse")
# Drawn things per grade, where on the table (metres), and how far from object and goal.
_DISTRACTORS = (2, 4, 8)
_TABLE = ((-0.35, 0.45), (0.35, 0.95))
_APART = 0.08
_SIZES = (0.015, 0.035)
# What is drawn where a goal is, on a pole, without which one camera cannot tell high from far: half
# their sides, metres, and their colour.
_MARKER, _POLE = 0.015, 0.008
_YELLOW = np.array([1.0, 0.9, 0.1, 1.0])
# How the camera that follows the hand looks at it: past the fingers, from the side.
_HAND_VIEW = 0.4, 150.0, -40.0
_BELOW_HAND = np.array([0.0, 0.0, -0.06])


class SceneDrawing:
    """Draws one model; looks are the model's own but for the shift of the episode."""

    def __init__(self, mujoco: Any, model: Any, image_size: int) -> None:
        self._mujoco = mujoco
        self._model = model
        self._image_size = image_size
        _make_cheap_to_draw(model, image_size)
        self._pristine = {name: getattr(model, name).copy() for name in _LOOKS}
        self._headlight = {name: getattr(model.vis.headlight, name).copy() for name in _HEADLIGHT}
        self._camera, self._options = _view(mujoco)
        # Position and size of what is only drawn, metres, and its colour.
        self._things: list[tuple[NDArray[np.float64], float, NDArray[np.float64]]] = []
        self._renderer: Any = None
        # Where the episode's goal is drawn, metres [3]; None for nowhere.
        self.marker: NDArray[np.float64] | None = None

    def draw(self, data: Any, hand: NDArray[np.float64] | None = None) -> NDArray[np.uint8]:
        """Return the picture of one camera.  uint8 [image_size, image_size, 3]

        Args:
            data: the simulator's.
            hand: where the hand is, metres [3], for the camera that follows it; None for the fixed
                one.
        """
        if self._renderer is None:
            self._renderer = _make_renderer(self._mujoco, self._model, self._image_size)
            # Registered after mujoco's own handler, so called before it shuts OpenGL down: a
            # renderer that outlives it prints errors.
            atexit.register(self.close)
        camera = self._camera if hand is None else _hand_view(self._mujoco, hand)
        self._renderer.update_scene(data, camera, self._options)
        for thing in self._things:
            self._add(*thing)
        if self.marker is not None:
            self._add_marker(self.marker)
        image: NDArray[np.uint8] = self._renderer.render().copy()
        return image

    def close(self) -> None:
        """Free the renderer; a second call does nothing."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
            atexit.unregister(self.close)

    def shift(self, shift: Shift | None, seed: int, placement: NDArray[np.float64]) -> None:
        """Give the scene its own looks, but for what the episode's shift changes of them."""
        self._restore()
        if shift is None:
            return
        draws = shift.draws(seed)
        if shift.kind == "camera":
            away = np.clip(draws.normal(size=6), -2.0, 2.0) * shift.grade
            self._camera.lookat[:] += _CAMERA_M * away[:3]
            self._camera.azimuth += _CAMERA_DEG * away[3]
            self._camera.elevation += _CAMERA_DEG * away[4]
            self._camera.distance *= 1.0 + _CAMERA_SHARE * away[5]
        elif shift.kind == "light":
            self._brighten(np.exp(_LIGHT * shift.grade * draws.uniform(0.5, 1.0) * _sign(draws)))
        elif shift.kind == "colour":
            self._colour(shift, draws)
        elif shift.kind == "distractors":
            self._things = _draw_things(_DISTRACTORS[shift.grade - 1], draws, placement)

    def _restore(self) -> None:
        for name, values in self._pristine.items():
            getattr(self._model, name)[:] = values
        for name, values in self._headlight.items():
            getattr(self._model.vis.headlight, name)[:] = values
        self._camera, self._options = _view(self._mujoco)
        self._things = []

    def _brighten(self, factor: float) -> None:
        lights = [self._model.light_diffuse, self._model.light_ambient]
        lights += [getattr(self._model.vis.headlight, name) for name in _HEADLIGHT]
        for light in lights:
            light[:] = np.clip(light * factor, 0.0, 1.0)

    def _colour(self, shift: Shift, draws: np.random.Generator) -> None:
        for colours in (self._model.geom_rgba, self._model.mat_rgba):
            factors = np.exp(_COLOUR * shift.grade * draws.normal(size=(len(colours), 3)))
            colours[:, :3] = np.clip(colours[:, :3] * factors, 0.0, 1.0)
        if shift.grade == 3:
            self._model.mat_texid[:] = -1

    def _add_marker(self, goal: NDArray[np.float64]) -> None:
        self._add(goal, _MARKER, _YELLOW)
        half = goal[2] / 2
        middle = goal - np.array([0.0, 0.0, half])
        self._add(middle, np.array([_POLE, _POLE, half]), _YELLOW)

    def _add(
        self,
        position: NDArray[np.float64],
        size: float | NDArray[np.float64],
        rgba: NDArray[np.float64],
    ) -> None:
        scene = self._renderer.scene
        self._mujoco.mjv_initGeom(
            scene.geoms[scene.ngeom],
            self._mujoco.mjtGeom.mjGEOM_BOX,
            np.broadcast_to(size, 3).astype(np.float64),
            position,
            np.eye(3).ravel(),
            rgba.astype(np.float32),
        )
        scene.ngeom += 1


def load_mujoco() -> Any:
    """Import mujoco.

    Raises:
        QvlaError: it or an OpenGL library is missing.
    """
    try:
        import mujoco
    except ImportError as error:
        if error.name == "mujoco":
            raise QvlaError("the simulator needs mujoco: pip install 'qvla[sim]'") from None
        raise _no_opengl(error) from error
    except Exception as error:
        # Any kind: PyOpenGL fails in many ways where a library is missing (AttributeError, OSError,
        # its own errors), mujoco with a RuntimeError. The cause stays on the error.
        raise _no_opengl(error) from error
    return mujoco


def _sign(draws: np.random.Generator) -> float:
    return float(draws.choice((-1.0, 1.0)))


def _draw_things(
    count: int, draws: np.random.Generator, placement: NDArray[np.float64]
) -> list[tuple[NDArray[np.float64], float, NDArray[np.float64]]]:
    """Return boxes on the table beside object and goal."""
    things: list[tuple[NDArray[np.float64], float, NDArray[np.float64]]] = []
    occupied = placement.reshape(-1, 3)[:, :2]
    while len(things) < count:
        spot, size = draws.uniform(*_TABLE), float(draws.uniform(*_SIZES))
        rgba = np.append(draws.uniform(size=3), 1.0)
        if np.linalg.norm(occupied - spot, axis=1).min() >= _APART:
            things.append((np.append(spot, size), size, rgba))
    return things


def _no_opengl(error: Exception) -> QvlaError:
    return QvlaError(
        f"cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}); "
        f"install the software OpenGL libraries: apt-get install {PACKAGES}"
    )


def _make_cheap_to_draw(model: Any, image_size: int) -> None:
    model.light_castshadow[:] = 0
    model.mat_reflectance[:] = 0
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    model.vis.global_.offwidth = image_size
    model.vis.global_.offheight = image_size
    for geom in range(model.ngeom):
        if model.body(model.geom_bodyid[geom]).name in _HIDDEN_BODIES:
            model.geom_group[geom] = _HIDDEN_GROUP


def _view(mujoco: Any) -> tuple[Any, Any]:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = (0.0, 0.73, 0.13)
    camera.distance, camera.azimuth, camera.elevation = 1.1, 90.0, -50.0
    options = mujoco.MjvOption()
    options.geomgroup[:] = _VISIBLE_GROUPS
    options.sitegroup[:] = 0
    return camera, options


def _hand_view(mujoco: Any, hand: NDArray[np.float64]) -> Any:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = hand + _BELOW_HAND
    camera.distance, camera.azimuth, camera.elevation = _HAND_VIEW
    return camera


def _make_renderer(mujoco: Any, model: Any, image_size: int) -> Any:
    try:
        renderer = mujoco.Renderer(model, image_size, image_size)
    except Exception as error:  # any kind, as in `load_mujoco`: the context is made here
        raise _no_opengl(error) from error
    flags = renderer.scene.flags
    flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
    flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return renderer
