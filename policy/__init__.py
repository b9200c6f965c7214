"""Diffusion policies: train them from demonstrations, roll them out, find out how few denoising steps suffice.

Importing this package imports nothing heavy: each name is loaded when it is first used.
"""

from importlib import import_module

import lazy_loader

from policy.model.storage import provide_storage

# The names and where they come from are in __init__.pyi, which type checkers read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

provide_storage(lambda: import_module("policy.checkpoint.hub").HubStorage())
