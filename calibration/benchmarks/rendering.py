"""How MuJoCo draws without a screen: chosen before it is imported, which is when it looks."""

import os


def choose_renderer() -> None:
    """Draw with EGL unless MUJOCO_GL says otherwise."""
    if os.environ.setdefault("MUJOCO_GL", "egl") in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
