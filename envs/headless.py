"""The choice of MuJoCo's graphics backend on a machine without a display."""

from __future__ import annotations

import ctypes
import os
import sys


def prefer_headless_gl() -> None:
    """Let MuJoCo draw with EGL if nobody has chosen a backend and there is no display.

    Call it before ``mujoco`` is first imported, because MuJoCo reads the variable at that moment. If libEGL cannot be
    loaded, the variable stays unset: with it, MuJoCo could not even be imported, and training draws no frames.
    """
    if not sys.platform.startswith("linux") or "MUJOCO_GL" in os.environ or os.environ.get("DISPLAY"):
        return
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return
    os.environ["MUJOCO_GL"] = "egl"
