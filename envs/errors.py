"""Errors that name the given value, the allowed ones and the next step."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

_SYSTEM_PACKAGES = {
    "libGL.so": "libgl1",
    "libEGL": "libegl1",
    "eglQueryString": "libegl1",  # PyOpenGL complains of this name if libEGL is missing
    "glGetError": "libosmesa6",  # and of this one if libOSMesa is missing
    "libgthread": "libglib2.0-0",
}


class MissingExtraError(ValueError):
    """An optional simulator, or a system library that it needs, is not installed."""


class EnvContractError(ValueError):
    """A simulator returned what Gymnasium, or the rule of success, has no place for; running on makes no sense."""


class DeviationError(ValueError):
    """A simulator returned something that ends its episode, such as NaN; the text is the whole reason."""


class RenderingUnavailableError(RuntimeError):
    """This machine (or this environment, as it was made) cannot draw a frame."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``allowed``, or an empty string."""
    candidates = list(allowed)
    matches = difflib.get_close_matches(word, candidates, n=1, cutoff=0.4)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def choose(kind: str, word: str, allowed: Iterable[str], *, hint: str = "") -> str:
    """Return ``word`` if it is one of ``allowed``.

    Args:
        kind: What the word names, as it should read in the message ("environment", "task").
        word: The word that was given.
        allowed: Every accepted word.
        hint: Appended to the message.

    Raises:
        ValueError: If it is not; the message names the word, the nearest match and every accepted word.
    """
    options = sorted(allowed)
    if word in options:
        return word
    listed = ", ".join(options) or "none"
    raise ValueError(f"Unknown {kind} {word!r}.{nearest(word, options)} Allowed: {listed}.{hint}")


def system_package(error: BaseException) -> str | None:
    """Return the Debian package that is missing according to ``error``, or None if it is not a known one."""
    return next((package for sign, package in _SYSTEM_PACKAGES.items() if sign in str(error)), None)


def import_extra(module: str, *, title: str, extra: str) -> ModuleType:
    """Import an optional simulator.

    Args:
        module: Module to import, such as ``"metaworld"``.
        title: The simulator's name in messages, such as ``"Meta-World"``.
        extra: The extra of this package that installs the simulator.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: If it cannot be imported; the message ends in the command that installs the extra or the
            system library.
    """
    try:
        return importlib.import_module(module)
    # Not ImportError alone: if libEGL is missing, PyOpenGL raises an AttributeError.
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        if "MUJOCO_GL" in str(error):
            raise MissingExtraError(f"{title} cannot be imported ({error}); set it to egl, or unset it") from error
        package = system_package(error)
        if package is not None:
            remedy = f"apt-get install {package}"
            message = f"{title} needs the system library package {package}; run: {remedy} ({error})"
            raise MissingExtraError(message) from error
        remedy = f"pip install 'ddim-policy[{extra}]'"
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module.split(".")[0]
        reason = "is not installed" if absent else f"cannot be imported ({error})"
        raise MissingExtraError(f"{title} {reason}; run: {remedy}") from error
