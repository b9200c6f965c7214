"""`backend=auto`: the fastest back end by a rule, and only where it samples the actions of `eager`."""

import pytest

import policy.inference.backends as backends
from policy import Sampler
from policy.inference.backends import choose_backend, compile_sampler
from tests.inference.cases import shared_policy


@pytest.fixture
def large(monkeypatch):
    """Every policy counts as a large one."""
    monkeypatch.setattr(backends, "LARGE_POLICY", 1)


@pytest.fixture
def onnx_is(monkeypatch):
    """Let another back end run under the name `onnx`, without a trace, which takes seconds."""

    def replace(build):
        monkeypatch.setattr(backends, "find_spec", lambda name: object())
        monkeypatch.setitem(backends.BACKENDS, "onnx", build)

    return replace


def test_a_small_policy_starts_at_once():
    assert choose_backend([shared_policy()], [Sampler()]) == "fused"


def test_a_large_policy_gets_onnx_if_it_agrees(large, onnx_is):
    onnx_is(backends.Fused)
    assert choose_backend([shared_policy()], [Sampler()]) == "onnx"
    assert compile_sampler(shared_policy(), Sampler(), backend="auto").backend == "onnx"


def test_a_back_end_that_disagrees_or_fails_is_not_taken(large, onnx_is):
    class Off(backends.Fused):
        def __call__(self, inputs):
            return super().__call__(inputs) + 0.01

    class Broken(backends.Fused):
        def __call__(self, inputs):
            raise RuntimeError("no kernel")

    for build in (Off, Broken):
        onnx_is(build)
        assert choose_backend([shared_policy()], [Sampler(eta=1.0)]) == "fused"


def test_without_the_packages_it_is_fused(large, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert choose_backend([shared_policy()], [Sampler()]) == "fused"


def test_narrow_weights_ask_for_onnx():
    assert choose_backend([shared_policy()], [Sampler()], "int8") == "onnx"
