"""Show what is inside a dataset before anybody trains on it."""

import importlib
import os
import sys

# `python scripts/train.py` puts this folder first on the path, where this file hides the standard library's `inspect`.
sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.path.dirname(os.path.realpath(__file__))]
if (
    __name__ == "inspect"
):  # somebody wants the standard library's: an import gives what stands in sys.modules at its end
    del sys.modules["inspect"]
    importlib.import_module("inspect")
else:
    from policy.data.inspection import inspect_demonstrations
    from scripts.command import command

    EXAMPLE = "python scripts/inspect.py dataset=zarr dataset.path=pusht_cchi_v7_replay.zarr.zip"
    main = command("inspect", EXAMPLE)(inspect_demonstrations)

    if __name__ == "__main__":
        main()
