"""Environments that report success in one way and whose seeds reproduce an episode.

Every environment of `make` observes one array or a dict of arrays by key, each a float32 vector or a (height, width,
channels) uint8 image, and acts by a float32 vector. It has ``info["is_success"]`` (bool) and ``info["score"]`` (in
[0, 1]) at reset and at each step, the control rate in Hz in ``metadata["render_fps"]`` where the simulator states one,
and a ``reset(seed=s)`` that starts the same episode whatever happened before.

The names of this package are listed in ``__init__.pyi``. Each is imported when it is first used, so that
``import envs`` loads neither Gymnasium nor a simulator.
"""

import lazy_loader

from envs.headless import prefer_headless_gl
from envs.registration import register_with_gymnasium

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# MuJoCo picks its graphics backend when it is first imported, which may be before the first make().
prefer_headless_gl()
register_with_gymnasium()
