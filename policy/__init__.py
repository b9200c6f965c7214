"""Train diffusion policies from demonstrations, roll them out, and find out how few denoising steps suffice.

Importing this package imports nothing heavy: each name is loaded when it is first used.
"""

from importlib import import_module

import lazy_loader

from policy.model.storage import provide_storage

# __init__.pyi lists the names and their modules; type checkers read it as well.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

provide_storage(lambda: import_module("policy.checkpoint.hub").HubStorage())
