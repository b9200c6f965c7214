"""A symmetry of the user's is tried before a training, and a wrong one is answered with what it takes and returns."""

import dataclasses

import numpy as np
import pytest

from policy.data.symmetry import CONTRACT, check_symmetry


def mirrored(observations, actions):
    return {key: -values for key, values in observations.items()}, -actions


def in_place(observations, actions):
    for values in (*observations.values(), actions):
        values *= -1
    return observations, actions


@pytest.mark.parametrize("augment", [mirrored, in_place, lambda seen, actions: [seen, actions.tolist()]])
def test_a_symmetry_is_tried_and_changes_nothing(augment, demonstrations):
    pictures = np.ones((len(demonstrations.actions), 4, 4, 3), np.int8)
    data = dataclasses.replace(demonstrations, observations={**demonstrations.observations, "image": pictures})
    before = {key: values.copy() for key, values in data.observations.items()}, data.actions.copy()
    check_symmetry(augment, data)
    np.testing.assert_equal((dict(data.observations), data.actions), before)


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (lambda observations: observations, r"failed with TypeError: .* takes 1 positional argument but 2 were given"),
        (lambda observations, actions: None, "failed with TypeError: cannot unpack"),
        (lambda observations, actions: observations, "failed with ValueError: not enough values to unpack"),
        (lambda observations, actions: (observations["position"], actions), "failed with KeyError: 'position'"),
        (lambda observations, actions: ({}, actions), "failed with KeyError: 'state'"),
        (lambda observations, actions: (observations, -actions[:, 0]), r"returned the shapes .*'actions': \(1,\)} for"),
        (
            lambda observations, actions: (observations, actions[..., :1]),
            r"returned the shapes {'state': \(1, 3\), 'actions': \(1, 1\)} for {.* 'actions': \(1, 2\)}",
        ),
        (  # as windows, which have one axis more
            lambda observations, actions: (observations, actions.reshape(len(actions), -1)),
            r"returned the shapes .*'actions': \(1, 2\)} for .*'actions': \(1, 1, 2\)}",
        ),
    ],
)
def test_a_wrong_one_is_refused_with_what_it_takes_and_returns(augment, said, demonstrations):
    with pytest.raises(ValueError, match=rf"^augment {said}") as refused:
        check_symmetry(augment, demonstrations)
    assert str(refused.value).endswith(CONTRACT)


def test_a_training_does_not_begin_with_a_wrong_one(planar_run, tmp_path, monkeypatch, run_command):
    (tmp_path / "my_symmetry.py").write_text("def mirror(observations):\n    return observations\n")
    monkeypatch.chdir(tmp_path)
    data = ("experiment=planar", f"dataset.path={planar_run}/planar-v0", "tracker=none")
    done = run_command("train", *data, "augment=my_symmetry:mirror", "output_dir=out", check=2)
    assert done.stderr.startswith("error: augment failed with TypeError: mirror() takes 1 positional argument")
    assert done.stderr.endswith(f"{CONTRACT}\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
