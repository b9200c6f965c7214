import io
import json
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file

from policy.adapters import inert_pickle, saved_config, torch_file
from policy.adapters.inert_pickle import Opaque
from policy.adapters.torch_file import StoredTensor, plain, read_torch_file
from scripts.bench import hostile_files as hostile

DATA = Path(__file__).resolve().parents[1] / "data"
# The reader's limits and the files that exceed them are made smaller alike.
SCALE = 50
LIMITS = (
    (inert_pickle, "MOST_OPERATIONS"),
    (inert_pickle, "MOST_VALUES"),
    (saved_config, "MOST_VALUES"),
    (torch_file, "MOST_PICKLE_BYTES"),
    (torch_file, "MOST_DIRECTORY_BYTES"),
)
FILES = hostile.hostile_files(SCALE)


def saved(path, value, **settings):
    torch.save(value, path, **settings)
    return path


def written(path, data):
    path.write_bytes(data)
    return path


def contents(path, operations):
    """What a checkpoint holds whose weights are what the operations push."""
    return read_torch_file(written(path, hostile.checkpoint(hostile.weights(operations))))["state_dicts"]["model"][
        "weight"
    ]


def equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(equal(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


def check_sentence(message, path):
    assert message.startswith((f"{path} ", "the configuration in the file "))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300


@pytest.mark.parametrize("kind", FILES)
def test_hostile_files_get_one_sentence_and_run_nothing(kind, tmp_path, monkeypatch):
    for module, limit in LIMITS:
        monkeypatch.setattr(module, limit, getattr(module, limit) // SCALE)
    path, marker = tmp_path / "x.ckpt", tmp_path / "ran"
    FILES[kind](path, marker)
    with pytest.raises(ValueError) as refused:
        plain(read_torch_file(path))
    check_sentence(str(refused.value), path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["GLOBAL, REDUCE", "STACK_GLOBAL, REDUCE", "INST", "OBJ"])
def test_the_hostile_code_would_run_where_a_pickle_is_loaded(kind, tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(hostile.pickled(hostile.code(marker)[kind]))
    assert marker.is_dir()


@pytest.mark.parametrize("make", [pickle.NEWOBJ, pickle.REDUCE])
def test_what_unknown_packages_make_is_a_stand_in_and_they_are_not_imported(make, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (tmp_path / "unknown_package.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nThing = os.mkdir\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = pickle.EMPTY_DICT + hostile.text("__class__") + hostile.number(1) + pickle.SETITEM
    made = hostile.name("unknown_package", "Thing") + hostile.text("x") + pickle.TUPLE1 + make + state + pickle.BUILD
    found = plain(contents(tmp_path / "x.ckpt", made))
    assert type(found) is Opaque
    assert (found.name, found.args, found.state) == ("unknown_package.Thing", ("x",), {"__class__": 1})
    assert repr(found) == "<unknown_package.Thing>"
    assert not marker.exists()


def test_lists_and_dictionaries_of_unknown_classes_keep_their_items(tmp_path):
    thing = hostile.name("mine", "Thing") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    appended = contents(tmp_path / "x.ckpt", thing + hostile.number(1) + pickle.APPEND)
    set_in = contents(tmp_path / "x.ckpt", thing + hostile.text("a") + hostile.number(1) + pickle.SETITEM)
    assert (appended.items, set_in.items) == ([1], [("a", 1)])


def test_a_key_that_would_take_forever_to_hash_is_a_stand_in(tmp_path):
    key = pickle.NONE + pickle.TUPLE1 + (pickle.DUP + pickle.TUPLE2) * 60
    found = contents(tmp_path / "x.ckpt", pickle.EMPTY_DICT + key + hostile.number(1) + pickle.SETITEM)
    assert [(type(key), value) for key, value in found.items()] == [(Opaque, 1)]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_as_torch_reads_it(protocol, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
    dtypes += [torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64]
    content = {
        "dtypes": [(base * 10).abs().to(dtype) for dtype in dtypes],
        "views": [base.T, base[2:5, ::3], base[:, 0], base[1, 2], base[:0], torch.zeros(0, 3), torch.tensor(1.0)],
        "parameters": [torch.nn.Parameter(base), torch.nn.Parameter(base[0].clone(), requires_grad=False)],
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "containers": [OrderedDict(a=1, b=2), defaultdict(list, {"k": [1]}), torch.Size([1, 2]), (), [], {}],
        "values": [None, True, False, 1, -1, 2**40, -(2**70), 1.5, "ü\n", b"\x00\xff", ""],
    }
    path = saved(tmp_path / "x.pt", content, pickle_protocol=protocol)
    assert equal(plain(read_torch_file(path)), torch.load(path, weights_only=False))


def test_sets_are_read_as_sequences(tmp_path):
    path = saved(tmp_path / "x.pt", {"set": {1}, "frozenset": frozenset([2]), "bytearray": bytearray(b"x")})
    found = plain(read_torch_file(path))
    assert [list(found[kind]) for kind in ("set", "frozenset")] == [[1], [2]]
    assert bytes(found["bytearray"]) == b"x"


def test_a_file_that_dill_wrote_holds_what_dill_saved():
    content = read_torch_file(DATA / "dill.ckpt")
    assert plain(content["cfg"]) == json.loads((DATA / "dill.json").read_text())
    found = plain(content["state_dicts"])
    flat = {f"{part}/{key}": value for part in ("model", "ema_model") for key, value in found[part].items()}
    expected = load_file(DATA / "dill.safetensors")
    assert flat.keys() == expected.keys()
    assert all(equal(flat[key], expected[key]) for key in expected)
    assert found["optimizer"]["state"][0]["step"] == 1
    assert content["pickles"]["epoch"][:1] == b"\x80"
    (counts, folder, keyed) = content["others"]
    assert (counts, folder.name, list(keyed.values())) == ({"a": [1]}, "pathlib.PurePosixPath", [3])


def test_interpolations_are_those_of_omegaconf(tmp_path):
    config = OmegaConf.create(
        {
            "a": 1,
            "dashed-key": "${a}",
            "list": ["${a}", {"b": "${..0}", "c": "${...a}"}],
            "node": {"x": {"y": "${...a}", "z": "${.y}", "t": "${a}/${.y}"}},
            "all": "${node}",
            "reached": "${all.x.z}",
            "none": "${nothing}",
            "nothing": None,
        }
    )
    found = plain(read_torch_file(saved(tmp_path / "x.pt", {"cfg": config})))
    assert found["cfg"] == OmegaConf.to_container(config, resolve=True)


def test_resolvers_and_paths_that_lead_nowhere_stay_text(tmp_path):
    values = {
        "a": "${now:%Y}",
        "b": "${eval:'1+1'}",
        "c": "${nowhere.x}",
        "d": "${.....a}",
        "e": "???",
        "g": 1,
    }
    values["h"] = "${g}_${nowhere}_${list}"
    config = OmegaConf.create({**values, "list": [1]})
    found = plain(read_torch_file(saved(tmp_path / "x.pt", config)))
    assert found == {**values, "h": "1_${nowhere}_${list}", "list": [1]}


def test_only_the_tensors_that_are_asked_for_are_read(tmp_path):
    kept, other = torch.full((3,), 1.25), torch.full((100,), 7.75)
    path = saved(tmp_path / "x.pt", {"model": kept, "optimizer": other})
    written(path, path.read_bytes().replace(other.numpy().tobytes(), bytes(400)))
    content = read_torch_file(path)
    assert isinstance(content["model"], StoredTensor)
    assert torch.equal(plain(content["model"]), kept)
    with pytest.raises(ValueError, match="checksum"):
        plain(content["optimizer"])


def test_tensors_share_memory_as_in_the_file(tmp_path):
    base = torch.arange(6.0)
    whole, part = plain(read_torch_file(saved(tmp_path / "x.pt", [base, base[2:]])))
    whole[3] = -1
    assert part[1] == -1


def test_a_byte_that_is_neither_0_nor_1_is_true(tmp_path):
    made = hostile.tensor(hostile.storage("BoolStorage", count=hostile.number(24)), shape=(24,), strides=(1,))
    found = plain(contents(tmp_path / "x.ckpt", made))
    assert torch.equal(found.view(torch.uint8), torch.tensor([byte != 0 for byte in hostile.NUMBERS]).to(torch.uint8))


def test_a_file_that_is_replaced_before_its_tensors_are_read_is_noticed(tmp_path):
    content = read_torch_file(saved(tmp_path / "x.pt", torch.zeros(3)))
    saved(tmp_path / "y.pt", torch.ones(3)).replace(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt .* replaced"):
        plain(content)
    (tmp_path / "x.pt").unlink()
    with pytest.raises(ValueError, match=r"x\.pt "):
        plain(content)


def test_members_with_64_bit_sizes_are_read(tmp_path):
    with ZipFile(tmp_path / "x.ckpt", "w") as file:
        for name, data in {"a/data.pkl": hostile.weights(hostile.tensor()), "a/data/0": hostile.NUMBERS}.items():
            with file.open(name, "w", force_zip64=True) as member:
                member.write(data)
    found = plain(read_torch_file(tmp_path / "x.ckpt"))["state_dicts"]["model"]["weight"]
    assert torch.equal(found, torch.arange(6.0).reshape(2, 3))


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x.pt", {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(plain(read_torch_file(path)), {"w": torch.ones(3)})


def test_a_path_that_cannot_be_asked_for_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing or damaged"):
        read_torch_file(tmp_path / ("x" * 300))


def test_a_link_to_a_file_is_followed(tmp_path):
    saved(tmp_path / "x.pt", {"a": 1})
    (tmp_path / "link.pt").symlink_to("x.pt")
    assert read_torch_file(tmp_path / "link.pt") == {"a": 1}


def small_file():
    content = {"cfg": OmegaConf.create({"a": 1, "b": "${a}"}), "w": torch.arange(6.0).reshape(2, 3), "l": [1, 2.5, "x"]}
    made = io.BytesIO()
    torch.save(content, made)
    return made.getvalue()


SMALL = small_file()
SMALL_PICKLE = ZipFile(io.BytesIO(SMALL)).read("archive/data.pkl")
EXPECTED = {"cfg": {"a": 1, "b": 1}, "w": torch.arange(6.0).reshape(2, 3), "l": [1, 2.5, "x"]}


@st.composite
def mutated(draw, data):
    """`data` with up to three pieces changed, removed, doubled or inserted."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.integers(0, 8))
        data = data[:start] + draw(st.binary(max_size=8) | st.just(data[start:end] * 2)) + data[end:]
    return data


@pytest.fixture(scope="module")
def mutant(tmp_path_factory):
    return tmp_path_factory.mktemp("mutants") / "x.pt"


def check_file(data, path):
    """A damaged file is refused, or holds what it held."""
    try:
        found = plain(read_torch_file(written(path, data)))
    except ValueError as refused:
        check_sentence(str(refused), path)
    else:
        assert equal(found, EXPECTED)


def check_pickle(data, path):
    """Any pickle is refused, or holds data."""
    try:
        found = plain(read_torch_file(written(path, hostile.archive({"data.pkl": data, "data/0": hostile.NUMBERS}))))
    except ValueError as refused:
        check_sentence(str(refused), path)
    else:
        assert isinstance(found, dict | list | tuple | str | int | float | bytes | torch.Tensor | Opaque | None)


CHECKS = ((check_file, SMALL), (check_pickle, SMALL_PICKLE))


@pytest.mark.parametrize(("check", "data"), CHECKS, ids=["file", "pickle"])
@settings(max_examples=150, deadline=2000, derandomize=True)
@given(draw=st.data())
def test_mutations_are_refused_or_read(check, data, draw, mutant):
    check(draw.draw(mutated(data)), mutant)


@pytest.mark.reliability
@pytest.mark.parametrize(("check", "data"), CHECKS, ids=["file", "pickle"])
@settings(max_examples=25_000, deadline=2000)
@given(draw=st.data())
def test_many_mutations_are_refused_or_read(check, data, draw, mutant):
    check(draw.draw(mutated(data)), mutant)
