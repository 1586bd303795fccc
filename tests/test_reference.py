"""115 runs recorded from TensorFlow 1.15.5, repeated through ``optimize_loss``."""

import functools
import json

import numpy as np
import pytest
from numpy_reference import as_float32, restate
from reference import (
    DATA,
    MEASURED,
    compare,
    load,
    play,
    recorded_results,
    tolerance_of,
)

RUNS = load(DATA)
REASONED_DIFFERENCES = {
    "mlp_SGD_clip_negative": "a negative bound is refused; it used to clip nothing",
    "mlp_SGD_mult_unmatched": "a multiplier of nothing is refused, no longer ignored",
    "quadU_Ftrl_none_gradient": "the gradient by an unused parameter is zero, not "
    "None, and Ftrl acts on zeros; `variables` leaves it out",
} | dict.fromkeys(
    ("mlp_Adam_f64", "quad_Adam_f64_lrtensor", "mlp_Adam_decay_exp_f64_lrtensor"),
    "TensorFlow holds beta2 as a float32 number for float64 parameters, too, so that "
    "its 1 - beta2 is wrong by 1.3e-5; here it is exact",
)
ALIKE = [name for name in RUNS if name not in REASONED_DIFFERENCES]
FLOAT64 = [name for name in RUNS if RUNS[name].dtype == "float64"]


@functools.cache
def played(name):
    return play(RUNS[name])


def pick(arrays, keys):
    return {key: arrays[key] for key in arrays if key in keys}


def narrow(array):
    return array.dtype == np.float32


def differences(name, found):
    return compare(recorded_results(RUNS[name]), found, tolerance_of(RUNS[name]))


@pytest.mark.parametrize("name", ALIKE)
def test_a_recorded_run_is_reproduced(name):
    assert differences(name, played(name)) == {}


@pytest.mark.parametrize("name", FLOAT64)
def test_a_float64_run_equals_the_exact_restatement(name):
    exact, found = restate(RUNS[name]), played(name)
    # What the summaries publish is float32 whatever the parameters are.
    published = {key for key in MEASURED if key in found and narrow(found[key])}
    expected = {key: exact[key] for key in recorded_results(RUNS[name])}
    assert compare(pick(expected, published), found, 1e-7) == {}
    assert compare(pick(expected, expected.keys() - published), found, 1e-12) == {}


@pytest.mark.parametrize("name", RUNS)
def test_the_restatement_reproduces_the_recording(name):
    rounded = restate(RUNS[name], constant=as_float32)
    tolerance = 1e-13 if RUNS[name].dtype == "float64" else 2e-5
    assert compare(recorded_results(RUNS[name]), rounded, tolerance) == {}


def test_there_are_115_recordings_and_few_differences():
    assert len(RUNS) == 115
    assert len(REASONED_DIFFERENCES) <= 12


def test_a_negative_bound_is_refused_and_infinity_measures_without_clipping():
    name = "mlp_SGD_clip_negative"
    with pytest.raises(ValueError, match="clip_gradients") as refused:
        play(RUNS[name])
    assert str(refused.value) == (
        "optimize_loss(clip_gradients=-1.0): must be a real number >= 0 (inf only "
        "measures), a 0-d array, a transformation such as adaptive_clipping(), or a "
        "function of (gradient, variable) pairs."
    )
    assert differences(name, play(RUNS[name], clip_gradients=float("inf"))) == {}


def test_a_multiplier_of_nothing_is_refused_and_is_not_needed():
    name = "mlp_SGD_mult_unmatched"
    with pytest.raises(ValueError, match="gradient_multipliers") as refused:
        play(RUNS[name])
    assert str(refused.value) == (
        "optimize_loss, gradient_multipliers: the pattern 'no_such_param' matches no "
        "parameter. The parameters are 'dense1/bias', 'dense1/kernel', 'dense2/bias', "
        "'dense2/kernel'."
    )
    assert differences(name, play(RUNS[name], gradient_multipliers=None)) == {}


def test_ftrl_zeroes_an_unused_parameter_unless_variables_leaves_it_out():
    name = "quadU_Ftrl_none_gradient"
    found = play(RUNS[name])
    assert set(differences(name, found)) == {"param/unused"}
    assert not found["param/unused"].any()
    assert differences(name, play(RUNS[name], variables=["a", "b", "c"])) == {}


@pytest.mark.parametrize("name", FLOAT64)
def test_only_adam_shows_that_the_recorded_constants_were_rounded(name):
    """By how much: 1.3e-5 of the second moment, and half of that of an update."""
    found = played(name)
    assert (differences(name, found) != {}) == (name in REASONED_DIFFERENCES)
    assert compare(recorded_results(RUNS[name]), found, 4e-6) == {}


def test_noise_moves_an_unused_parameter_unless_variables_leaves_it_out():
    run = RUNS["quadU_SGD_noise_none_gradient"]
    start = run.data["init/unused"]
    moved = play(run, gradient_noise_scale=0.5)["param/unused"]
    assert (np.diff(moved, axis=0) != 0).all()
    kept = play(run, gradient_noise_scale=0.5, variables=["a", "b", "c"])
    assert (kept["param/unused"] == start).all()


def test_noise_of_scale_zero_changes_nothing():
    name = "noise_SGD_zero_scale"
    assert differences(name, play(RUNS[name], gradient_noise_scale=0.0)) == {}


def test_an_instance_reports_no_rate():
    assert "lr" not in played("quad_SGD_instance_own_lr")


def test_an_unpacked_set_is_read_alike(tmp_path):
    run = RUNS["quad_SGD_clip"]
    files = {"file": "case.npz", "problem_file": "problem.npz"}
    manifest = {"cases": [run.case | files], "param_names": {"quad": run.names}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    np.savez(tmp_path / "case.npz", **run.recorded)
    np.savez(tmp_path / "problem.npz", **run.data)
    read = load(tmp_path)["quad_SGD_clip"]
    for expected, found in [(run.data, read.data), (run.recorded, read.recorded)]:
        assert expected.keys() == found.keys()
        assert all((expected[key] == found[key]).all() for key in expected)


def test_a_deviation_is_found():
    name = "quad_SGD_clip"
    found = {key: np.copy(rows) for key, rows in recorded_results(RUNS[name]).items()}
    assert differences(name, found) == {}
    found["param/b"][7, 1, 2] += 1e-4
    found["global_step"][29] += 1
    found["loss"][3] = np.nan
    assert {key: row for key, (row, _) in differences(name, found).items()} == {
        "param/b": 7,
        "global_step": 29,
        "loss": 3,
    }
