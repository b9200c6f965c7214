"""Run an exported policy with numpy and onnxruntime alone: python run_exported_policy.py FOLDER."""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

SCHEMA_VERSION = 2


class ExportedPolicy:
    """Observation histories in, action chunks out, in the data's units."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        if not (folder / "export.json").is_file():
            raise ValueError(f"no exported policy at {folder}: write one with scripts/export.py")
        self.about = json.loads((folder / "export.json").read_text())
        if (found := self.about.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"{folder} has export schema {found!r}; this reads {SCHEMA_VERSION}: export it anew")
        model = (folder / self.about["model"]).read_bytes()
        if hashlib.sha256(model).hexdigest() != self.about["sha256"]:
            raise ValueError(f"{folder}/{self.about['model']} is damaged or of another export: export it anew")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Inputs by the names in export.json to actions (batch, action_horizon, action_dim)."""
        if inputs.keys() != self.about["inputs"].keys():
            raise ValueError(f"the policy takes {sorted(self.about['inputs'])}; got {sorted(inputs)}")
        batch = len(inputs["noise"])
        for name, about in self.about["inputs"].items():
            shape = tuple(batch if size == "batch" else size for size in about["shape"])
            if inputs[name].shape != shape or inputs[name].dtype != about["dtype"]:
                got = f"{inputs[name].shape} {inputs[name].dtype}"
                raise ValueError(f"{name} must have shape {shape} and be {about['dtype']}; got {got}")
        return self.session.run(["actions"], inputs)[0]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    policy = ExportedPolicy(folder)
    example = dict(np.load(folder / "example_input.npz", allow_pickle=False))
    begin = time.perf_counter()
    actions = policy(example)
    milliseconds = 1e3 * (time.perf_counter() - begin)
    difference = np.abs(actions - np.load(folder / "example_output.npy", allow_pickle=False)).max()
    print(f"first chunk: {milliseconds:.1f} ms, off by {difference:.1e}; its first action: {actions[0, 0]}")
