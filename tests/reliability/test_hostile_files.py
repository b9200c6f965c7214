"""Files from strangers: whatever a checkpoint folder holds, it loads or is a ValueError, and nothing is executed."""

import dataclasses
import json
import os
import pickle
import resource
import struct
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from policy import DiffusionPolicy, load_checkpoint
from policy.checkpoint import choose_env
from policy.checkpoint.files import MAX_BYTES, MAX_HEADER_BYTES, MAX_MESSAGE, seal
from tests.conftest import randomize, small_config

CONFIG = small_config(obs_size=8, hidden_size=8)
WEIGHTS = "policy.safetensors"
SOON = 10.0  # seconds; a load takes some milliseconds


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    policy = DiffusionPolicy(CONFIG)
    randomize(policy)
    policy.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return copy(original, tmp_path / "checkpoint")


def copy(original: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_config(**changes) -> Callable[[Path], None]:
    """`policy__denoiser__hidden_size=3` sets config["policy"]["denoiser"]["hidden_size"]."""

    def change(folder: Path) -> None:
        config = config_of(folder)
        for path, value in changes.items():
            *parents, key = path.split("__")
            node = config
            for parent in parents:
                node = node[parent]
            node[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def sparse(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def change_header(change: Callable[[dict], object], length: int | None = None) -> Callable[[Path], None]:
    """Rewrite the safetensors header, which says where each tensor is; the data behind it stays."""

    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        replaced = change(header)
        text = json.dumps(header if not isinstance(replaced, str) else None).encode()
        if isinstance(replaced, str):
            text = replaced.encode()
        claimed = len(text) if length is None else length
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + text + data[8 + size :])

    return rewrite


def set_first(**values) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        header[min(k for k in header if k != "__metadata__")].update(values)

    return change


def overlap(header: dict) -> None:
    """Two tensors over the same bytes, the size of the file accounted for."""
    names = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    one, two = header[names[0]], header[names[1]]
    two["data_offsets"][0] = one["data_offsets"][0]


def change_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


def link(name: str, target: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.write_bytes((folder / name).read_bytes())  # what it leads to is a perfect file
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return replace


def pipe(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def folder_at(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_OBJECT = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
NAN, INF = float("nan"), float("inf")
BIAS = "denoiser.leave.bias"

# Their checksums are put right afterwards: a stranger can do that as well.
HOSTILE: dict[str, Callable[[Path], None]] = {
    # headers that lie
    "header longer than the file": change_header(lambda h: None, length=2**20),
    "header of 2^60 bytes": change_header(lambda h: None, length=2**60),
    "header of 2^64 - 1 bytes": change_header(lambda h: None, length=2**64 - 1),
    "header of no bytes": change_header(lambda h: None, length=0),
    "header above the limit": lambda f: change_header(lambda h: None, length=MAX_HEADER_BYTES + 1)(f),
    "header is a list": change_header(lambda h: "[]"),
    "header is deep": change_header(lambda h: DEEP.decode()),
    "header is a deep object": change_header(lambda h: DEEP_OBJECT.decode()),
    "header is not JSON": change_header(lambda h: "{'a': 1}"),
    "header is empty": change_header(lambda h: "{}"),
    "offsets behind the end": change_header(set_first(data_offsets=[0, 2**40])),
    "offsets of 2^64": change_header(set_first(data_offsets=[0, 2**64])),
    "negative offsets": change_header(set_first(data_offsets=[-8, 8])),
    "offsets the wrong way": change_header(set_first(data_offsets=[64, 0])),
    "offsets overlap": change_header(overlap),
    "offsets are text": change_header(set_first(data_offsets="0, 8")),
    "one offset": change_header(set_first(data_offsets=[0])),
    "unknown dtype": change_header(set_first(dtype="PICKLE")),
    "dtype of another width": change_header(set_first(dtype="F64")),
    "dtype of the same width": change_header(set_first(dtype="I32")),
    "dtype is a number": change_header(set_first(dtype=32)),
    "shape overflows": change_header(set_first(shape=[2**32, 2**32, 2**32])),
    "negative shape": change_header(set_first(shape=[-1])),
    "shape of fractions": change_header(set_first(shape=[1.5])),
    "shape of 10,000 dimensions": change_header(set_first(shape=[1] * 10_000)),
    "empty tensor of a huge shape": change_tensors(lambda t: t.update({BIAS: torch.zeros(0, 2**40)})),
    # weights that are none
    "not a number": change_tensors(lambda t: t[BIAS].fill_(NAN)),
    "infinity": change_tensors(lambda t: t[BIAS].fill_(INF)),
    "statistics that are no numbers": change_tensors(lambda t: t["action_normalizer.center"].fill_(NAN)),
    "other precision": change_tensors(lambda t: t.update({k: v.double() for k, v in t.items()})),
    "half precision": change_tensors(lambda t: t.update({k: v.bfloat16() for k, v in t.items()})),
    "whole numbers": change_tensors(lambda t: t.update({BIAS: t[BIAS].int()})),
    "complex numbers": change_tensors(lambda t: t.update({BIAS: t[BIAS].to(torch.complex64)})),
    "a name that is a path": change_tensors(lambda t: t.update({"../../x": t.pop(BIAS)})),
    "no bytes": write(WEIGHTS, b""),
    "seven bytes": write(WEIGHTS, b"\0" * 7),
    "text": write(WEIGHTS, b"weights" * 100),
    "zeros": write(WEIGHTS, b"\0" * 10_000),
    # JSON that is too much
    "deep lists": write("config.json", DEEP),
    "deep objects": write("config.json", DEEP_OBJECT),
    "deep below the parser's limit": lambda f: change_config(policy__encoder=json.loads("[" * 900 + "]" * 900))(f),
    "deep environment": lambda f: change_config(env=json.loads("[" * 900 + "]" * 900))(f),
    "a number of 100,000 digits": write("config.json", b'{"schema_version": ' + b"9" * 100_000 + b"}"),
    "a horizon of 4,000 digits": change_config(execution_horizon=10**4000),
    "a size of 4,000 digits": change_config(policy__obs_size=10**4000),
    "config above the limit": write("config.json", b" " * (MAX_BYTES["config.json"] + 1)),
    "config of a terabyte": sparse("config.json", 2**40),
    "weights of a terabyte": sparse(WEIGHTS, 2**40),
    "not UTF-8": write("config.json", b'{"schema_version": "\xff\xfe"}'),
    "null": write("config.json", b"null"),
    # paths
    "config links out": link("config.json", "../outside"),
    "weights link out": link(WEIGHTS, "../outside"),
    "weights link to a device": link(WEIGHTS, "/dev/zero"),
    "config links to a device": link("config.json", "/dev/zero"),
    "config links to itself": link("config.json", "config.json"),
    "weights are a pipe": pipe(WEIGHTS),
    "config is a pipe": pipe("config.json"),
    "weights are a folder": folder_at(WEIGHTS),
    "config is a folder": folder_at("config.json"),
    # networks of absurd size
    "a hidden layer of 2^40": change_config(policy__denoiser__hidden_size=2**40),
    "a hidden layer of 2^62": change_config(policy__denoiser__hidden_size=2**62),
    "a hidden layer of 2^100": change_config(policy__denoiser__hidden_size=2**100),
    "a hidden layer of 40 GB": change_config(policy__denoiser__hidden_size=50_000),
    "a billion layers": change_config(policy__denoiser__num_layers=10**9),
    "an encoder of 40 GB": change_config(policy__encoder__hidden_size=10**9),
    "an embedding of 2^40": change_config(policy__obs_size=2**40),
    "actions of 2^40": change_config(policy__action_dim=2**40),
    "a horizon of 2^40": change_config(policy__action_horizon=2**40),
    "a history of 2^40": change_config(policy__obs_horizon=2**40),
    "observations of 2^40": change_config(policy__observation_shapes={"state": [2**40]}),
    "an image of 2^60 pixels": change_config(policy__observation_shapes={"state": [2**30, 2**30, 3]}),
    "a schedule of 2^40": change_config(policy__schedule__num_steps=2**40),
    "a schedule of 10^8": change_config(policy__schedule__num_steps=10**8),
    "100,000 cameras' layers": change_config(
        policy__observation_shapes={"image": [32, 32, 3]}, policy__encoder={"name": "image", "channels": [16] * 100_000}
    ),
    "30,000 observations": change_config(policy__observation_shapes={f"s{n}": [1] for n in range(30_000)}),
    # names that are none
    "unknown encoder": change_config(policy__encoder__name="os.system"),
    "unknown denoiser": change_config(policy__denoiser__name="torch.hub.load"),
    "a Hydra target": change_config(policy__denoiser___target_="os.system"),
    "an observation with a dot": change_config(policy__observation_shapes={"a.b": [3]}),
    "an observation without a name": change_config(policy__observation_shapes={"": [3]}),
    "an observation that is a path": change_config(policy__observation_shapes={"../../x": [3]}),
    "an observation named like a method": change_config(policy__observation_shapes={"forward": [3], "keys": [3]}),
    "an environment without a name": change_config(env={"id": "x"}),
    "an environment named by a list": change_config(env={"name": ["planar"]}),
    "horizon is true": change_config(execution_horizon=True),
    "horizon is infinite": change_config(execution_horizon=INF),
    "horizon beyond the chunk": change_config(execution_horizon=9),
    "horizon 0": change_config(execution_horizon=0),
    "dropout of more than all": change_config(policy__encoder__dropout=1.5),
}


def repair_checksums(folder: Path) -> None:
    if all((folder / name).is_file() and (folder / name).stat().st_size < 2**22 for name in ("config.json", WEIGHTS)):
        seal(folder)


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_bearable_words_time_and_memory(folder, trick):
    HOSTILE[trick](folder)
    repair_checksums(folder)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    assert type(error.value) is ValueError
    assert "SHA-256" not in str(error.value)  # that is not what it was refused for
    assert 10 < len(str(error.value)) < MAX_MESSAGE + 400
    assert time.perf_counter() - began < SOON
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_the_tricks_are_what_is_refused(folder):
    """The control: a copy with its checksums put right, on which no trick was played, loads."""
    repair_checksums(folder)
    assert load_checkpoint(folder).policy.config == CONFIG
    print(f"hostile checkpoints refused: {len(HOSTILE)}")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "checksums.json"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "torch legacy", "zip of a pickle"])
def test_no_pickle_is_executed_whatever_its_name(folder, tmp_path, name, kind):
    control, marker = tmp_path / "control", tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(control)))
    assert control.exists()  # the payload does work
    file = folder / name
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(marker)))
    else:
        content = {"weights": Payload(marker), "more": torch.zeros(3)}
        torch.save(content, file, _use_new_zipfile_serialization=kind != "torch legacy")
    if name != "checksums.json":
        repair_checksums(folder)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="damaged"):
        DiffusionPolicy.from_pretrained(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_every_flipped_byte_is_noticed(original, tmp_path, name):
    """A hundred places all over the file: none may load, and the file is named."""
    folder = copy(original, tmp_path / "checkpoint")
    content = (folder / name).read_bytes()
    for place in range(0, len(content), max(1, len(content) // 100)):
        flipped = bytearray(content)
        flipped[place] ^= 4
        (folder / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"{name}|schema"):
            load_checkpoint(folder)


def test_a_checksum_that_does_not_fit_is_one_sentence_that_names_the_file(folder):
    change_tensors(lambda t: t[BIAS].add_(1))(folder)
    with pytest.raises(
        ValueError, match=rf"{WEIGHTS} is damaged: its SHA-256 is not the one that checksums.json noted"
    ):
        load_checkpoint(folder)


def test_checksums_cannot_be_left_out(folder):
    (folder / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"checksums\.json is missing"):
        load_checkpoint(folder)
    change_config(schema_version=1, policy__encoder__skip=True)(folder)
    expected = dataclasses.replace(CONFIG, encoder={**CONFIG.encoder, "skip": True})
    assert load_checkpoint(folder).policy.config == expected  # what schema 1 promised


def test_links_inside_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "weights")
    (folder / WEIGHTS).symlink_to("weights")
    (tmp_path / "newest").symlink_to(folder)
    assert load_checkpoint(tmp_path / "newest").policy.config == CONFIG


def test_building_networks_is_not_limited_after_a_refusal(folder):
    change_config(policy__denoiser__num_layers=10**9)(folder)
    repair_checksums(folder)
    with pytest.raises(ValueError, match="asks for more than their"):
        load_checkpoint(folder)
    deep = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(200)))
    assert len(list(deep.parameters())) == 400


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["state", "image", "modulated_mlp", "residual_mlp", "unet", "transformer", "linear", "../x", "8"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def paths_of(node, path=()):
    yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from paths_of(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from paths_of(value, (*path, index))


def mutate(config: dict, data: st.DataObject) -> object:
    path = data.draw(st.sampled_from([p for p in paths_of(config) if not p or p[0] != "versions"]))
    kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if not path:
        return data.draw(json_values)
    *parents, key = path
    node = config
    for parent in parents:
        node = node[parent]
    if kind == "remove":
        del node[key]
    elif kind == "add" and isinstance(node[key], dict):
        node[key][
            data.draw(st.text(max_size=8) | st.sampled_from(["name", "hidden_size", "num_layers", "channels"]))
        ] = data.draw(json_values)
    else:
        node[key] = data.draw(json_values)
    return config


def fuzz_config(original: Path, folder: Path, examples: int) -> dict[str, int]:
    counts = {"refused": 0, "loaded": 0}
    copy(original, folder)
    valid = config_of(original)

    @settings(
        max_examples=examples,
        deadline=timedelta(seconds=SOON),
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(st.data())
    def run(data):
        config = json.loads(json.dumps(valid))
        for _ in range(data.draw(st.integers(1, 3))):
            if isinstance(config, dict) and config:
                config = mutate(config, data)
        (folder / "config.json").write_text(json.dumps(config))
        seal(folder)
        try:
            loaded = load_checkpoint(folder)
        except ValueError:
            counts["refused"] += 1
            return
        counts["loaded"] += 1
        assert next(loaded.policy.parameters()).isfinite().all()
        try:
            assert isinstance(choose_env(loaded, None)["name"], str)
        except ValueError:
            assert loaded.env is None or ":" in str(loaded.env.get("id"))

    run()
    return counts


def test_any_config_loads_or_is_a_value_error(original, tmp_path):
    counts = fuzz_config(original, tmp_path / "checkpoint", 150)
    assert counts["refused"] > 75
    assert counts["loaded"] > 0  # such as another environment: not everything is refused


@pytest.mark.reliability
def test_any_of_many_configs_loads_or_is_a_value_error(original, tmp_path):
    counts = fuzz_config(original, tmp_path / "checkpoint", 2_000)
    print(f"config.json mutations: {counts['refused']} refused, {counts['loaded']} loaded, no other outcome")
    assert counts["refused"] + counts["loaded"] >= 2_000


@pytest.mark.reliability
def test_any_bytes_in_the_weights_load_or_are_a_value_error(original, tmp_path):
    """Cut, flipped and replaced bytes, mostly in the header, with the checksums put right."""
    folder, counts = copy(original, tmp_path / "checkpoint"), {"refused": 0, "loaded": 0}
    content = (original / WEIGHTS).read_bytes()
    (header,) = struct.unpack("<Q", content[:8])

    @settings(max_examples=2_000, deadline=timedelta(seconds=SOON), database=None, derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(0, header + 64), st.binary(max_size=8)), min_size=1, max_size=4), st.booleans()
    )
    def run(patches, cut):
        changed = bytearray(content)
        for place, patch in patches:
            changed[place : place + len(patch)] = patch
        (folder / WEIGHTS).write_bytes(changed[: -len(patches)] if cut else changed)
        seal(folder)
        try:
            load_checkpoint(folder)
            counts["loaded"] += 1
        except ValueError:
            counts["refused"] += 1

    run()
    print(f"policy.safetensors mutations: {counts['refused']} refused, {counts['loaded']} loaded, no other outcome")
    assert counts["refused"] > 1_000
