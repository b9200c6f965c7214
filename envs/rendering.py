"""Drawing with MuJoCo, and one error with a remedy where no frame can be drawn."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.errors import RenderingUnavailableError

# Libraries that draw, by a part of their modules' names.
GRAPHICS = {"OpenGL", "dm_control", "glfw", "moderngl", "mujoco", "mujoco_rendering", "pygame", "pyglet", "pyrender"}


@contextmanager
def rendering_errors() -> Iterator[None]:
    """Turn any error in drawing into a `RenderingUnavailableError`, with the remedy if the graphics stack failed.

    An environment that has no `render` raises NotImplementedError, which passes.
    """
    try:
        yield
    except (RenderingUnavailableError, NotImplementedError):
        raise
    except Exception as error:  # each GL backend raises exceptions of its own, without a common class
        if not _of_graphics(error):
            raise RenderingUnavailableError(f"render() failed: {_first_line(error)}") from error
        raise RenderingUnavailableError(
            "Cannot render here: install libegl1 and libgl1-mesa-dri (Debian) and start Python with "
            f"MUJOCO_GL=egl, or set MUJOCO_GL=osmesa with libosmesa6 ({_first_line(error)})."
        ) from error


def require_rgb_array(render_mode: str | None) -> None:
    """Refuse to draw for an environment that was made without a render mode.

    Raises:
        RenderingUnavailableError: If ``render_mode`` is not ``"rgb_array"``.
    """
    if render_mode != "rgb_array":
        raise RenderingUnavailableError(
            f"Cannot render: the environment has render_mode={render_mode!r}; make it with render_mode='rgb_array'."
        )


def fast_renderer(model: Any, image_size: int) -> Any:
    """Build one of MuJoCo's offscreen renderers without antialiasing, shadows and reflections.

    With them, software rendering is ten times slower.

    Args:
        model: The ``mujoco.MjModel`` to draw; its antialiasing is switched off, and its buffer made large enough.
        image_size: Height and width of a frame, in pixels.

    Returns:
        A ``mujoco.Renderer``.
    """
    import mujoco

    # If a renderer cannot be built, its finalizer fails because these attributes do not exist.
    for owner, name in (
        (mujoco.Renderer, "_gl_context"),
        (mujoco.Renderer, "_mjr_context"),
        (mujoco.GLContext, "_context"),
    ):
        setattr(owner, name, getattr(owner, name, None))
    model.vis.quality.offsamples = 0
    # MuJoCo draws into a buffer of the size that the model states, 640 x 480 by default.
    for side in ("offwidth", "offheight"):
        setattr(model.vis.global_, side, max(getattr(model.vis.global_, side), image_size))
    renderer = mujoco.Renderer(model, image_size, image_size)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = False
    return renderer


class SceneRenderer:
    """Draws a scene of MuJoCo; the graphics are opened for the first picture.

    Args:
        image_size: Height and width of a picture, in pixels.
    """

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size
        self._renderer: Any = None

    def draw(self, model: Any, data: Any, camera: str) -> NDArray[np.uint8]:
        """Draw the scene, (image_size, image_size, 3) uint8.

        Args:
            model: The ``mujoco.MjModel`` to draw, the same in every call.
            data: Its ``mujoco.MjData``.
            camera: Name of the camera.

        Raises:
            RenderingUnavailableError: If this machine cannot render.
        """
        with rendering_errors():
            if self._renderer is None:
                self._renderer = fast_renderer(model, self._image_size)
                # Closes the renderer before the interpreter tears OpenGL down, even if nobody calls close().
                self._finalizer = weakref.finalize(self, self._renderer.close)
            self._renderer.update_scene(data, camera=camera)
            frame: NDArray[np.uint8] = self._renderer.render()
        return frame

    def close(self) -> None:
        """Free the graphics; a later picture opens them again."""
        if self._renderer is not None:
            self._finalizer()
            self._renderer = None


def _of_graphics(error: BaseException) -> bool:
    """Whether an error comes from a graphics library, or passed through one."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(part in GRAPHICS for name in (*modules, type(error).__module__) for part in name.split("."))


def _first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its text; some GL errors have a text that cannot be read."""
    try:
        text = (str(error).splitlines() or [""])[0]
    except Exception:
        text = "no further text"
    return f"{type(error).__name__}: {text}"
