"""The port that the docs show beside its TensorFlow script trains as TensorFlow did."""

import importlib.util
import json
import runpy
from pathlib import Path

import jax
import numpy as np
from reference import DATA, compare, load, recorded_results, start, tolerance_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_multipliers import SHARE_OF_THE_PATH

import optloss

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "from_tensorflow"
PAGE = ROOT / "docs" / "tensorflow.md"
RUN = load(DATA)["combo_Adam"]
WEIGHTS = RUN.data[f"weights/{RUN.case['weights']}"]
BATCHES = list(zip(RUN.data["data/x"], RUN.data["data/y"], WEIGHTS, strict=True))


def load_port():
    spec = importlib.util.spec_from_file_location("port", SCRIPTS / "port.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events(logdir):
    accumulator = EventAccumulator(str(logdir)).Reload()
    return {
        tag.removeprefix("OptimizeLoss/"): np.array(
            [event.value for event in accumulator.Scalars(tag)]
        )
        for tag in accumulator.Tags()["scalars"]
    }


def test_the_script_and_the_recorded_run_have_the_same_arguments():
    script = (SCRIPTS / "tf1.py").read_text()
    case = RUN.case
    assert f'optimizer="{case["optimizer"]}"' in script
    assert f"learning_rate={case['lr']}" in script
    assert f"clip_gradients={case['clip']}" in script
    decay = case["decay"]
    assert decay["fn"] == "exponential_decay"
    assert f"tf.train.{decay['fn']}\n" in script
    for name, value in decay["args"].items():
        assert f"{name}={value}" in script
    for name, value in case["multipliers"].items():
        assert f'"{name}:0": {value},' in script
    assert set(RUN.names) - set(case["variables"]) == {"dense1/bias"}
    assert 'variable.op.name != "dense1/bias"' in script


def test_the_port_reproduces_the_recorded_run(tmp_path):
    state = load_port().train(start(RUN), BATCHES, tmp_path)
    expected = recorded_results(RUN)
    last = {name: rows[-1:] for name, rows in expected.items()}
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    found = {
        f"param/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf[None]
        for path, leaf in leaves
    }
    found["global_step"] = state.step[None]
    assert compare({name: last[name] for name in found}, found, tolerance_of(RUN)) == {}

    written = events(tmp_path)
    found = {
        "loss": written["loss"],
        "lr": written["learning_rate"],
        "grad_norm": written["global_norm/gradient_norm"],
        "clipped_norm": written["global_norm/clipped_gradient_norm"],
    }
    rows = {name: expected[name] for name in found}
    assert compare(rows, found, tolerance_of(RUN)) == {}
    assert {len(values) for values in found.values()} == {30}


def test_the_update_op_keeps_the_averages(tmp_path):
    state = load_port().train(start(RUN), BATCHES, tmp_path)
    recorded = {name: RUN.recorded[f"param/{name}"] for name in RUN.names}
    mean, variance = np.zeros(7), np.ones(7)
    for k, (x, _, _) in enumerate(BATCHES):
        kernel, bias = recorded["dense1/kernel"][k], recorded["dense1/bias"][k]
        hidden = np.tanh(x @ kernel + bias)
        mean += 0.1 * (hidden.mean(0) - mean)
        variance += 0.1 * (hidden.var(0) - variance)
    np.testing.assert_allclose(state.model_state["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(state.model_state["variance"], variance, atol=1e-5)


def test_a_wrong_argument_would_be_seen(tmp_path, monkeypatch):
    port = load_port()
    whole = optloss.optimize_loss
    monkeypatch.setattr(
        optloss,
        "optimize_loss",
        lambda *args, **kwargs: whole(*args, **(kwargs | {"clip_gradients": 5.5})),
    )
    state = port.train(start(RUN), BATCHES, tmp_path)
    kernel = state.params["dense1"]["kernel"][None]
    expected = {"param/dense1/kernel": RUN.recorded["param/dense1/kernel"][-1:]}
    found = {"param/dense1/kernel": kernel}
    assert compare(expected, found, tolerance_of(RUN)) != {}


def test_the_table_of_deviations_is_the_measured_one():
    script = ROOT / "benchmarks" / "optimizer_deviation.py"
    table = runpy.run_path(str(script))["table"]
    measured = json.loads(
        (script.parent / "results" / f"{script.stem}.json").read_text()
    )
    assert "\n".join(table(measured["deviations"])) in PAGE.read_text()


def test_the_guide_quotes_what_is_left_of_a_multiplier_of_the_gradient():
    page = (ROOT / "docs" / "guides" / "multipliers.md").read_text()
    for name, (early, late) in SHARE_OF_THE_PATH.items():
        assert f'| `"{name}"` | {early:.2f} | {late:.2f} | 0.10 |' in page
