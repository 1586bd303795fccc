"""What XLA makes of a step for devices that are not here: a GPU and a TPU.

The benchmarks do the same at the size of networks.
"""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optloss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LEAVES, ELEMENTS = 4, 4096
SIZE = f"{LEAVES * ELEMENTS}/{LEAVES}"
GRADIENT = 4 * LEAVES * ELEMENTS  # bytes


@pytest.fixture(scope="module")
def benchmarks():
    """The directory of the scripts, importable."""
    if not (BENCHMARKS / "targets.py").exists():
        pytest.skip("the benchmarks are not part of this distribution")
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def targets(benchmarks):
    return benchmarks("targets")


@pytest.fixture(scope="module")
def compilers(benchmarks):
    return benchmarks("compilers")


@pytest.fixture(scope="module")
def figures(targets, compilers, tmp_path_factory):
    """Return the figures of a program, compiled once, and its HLO among them."""

    @functools.cache
    def of(name, cpus=2):
        target = name.split("/")[1]
        if lacking := compilers.missing(target):
            pytest.skip(f"compiling for {target} takes {' and '.join(lacking)}")
        hlo = tmp_path_factory.mktemp("programs") / "hlo.txt"
        return targets.measure(name, cpus, hlo) | {"hlo": hlo.read_text()}

    return of


@pytest.mark.parametrize(
    "case", ["clip+guard", "noise+clip+guard", "clip+gradient_norm", "clip+spikes"]
)
def test_a_gpu_runs_a_step_without_the_host(figures, case):
    step = figures(f"optloss/h100/{case}/{SIZE}")
    assert step["host_waits"] == 0
    assert step["launches"] <= 2
    assert step["copied"] == 0


def test_the_guard_allocates_nothing_on_a_gpu(figures):
    step = figures(f"optloss/h100/clip+guard/{SIZE}")
    bare = figures(f"optax/h100/clip/{SIZE}")
    assert step["temporaries"] < GRADIENT / 4
    assert step["bytes"] <= 1.05 * bare["bytes"]


def test_two_guards_are_one_on_a_gpu(figures):
    one = figures(f"optloss/h100/clip+guard/{SIZE}")
    both = figures(f"optloss/h100/clip+spikes/{SIZE}")
    assert both["bytes"] <= one["bytes"] + 1000  # the statistics, scalars
    assert both["temporaries"] <= one["temporaries"] + 1000


@pytest.mark.parametrize(
    "step", ["clip+guard/{}/op", "clip+guard/{}/chain", "noise+clip+guard/{}/op"]
)
def test_a_tpu_runs_a_step_without_loops(figures, step):
    step = figures(f"optloss/tpu/{step.format(SIZE)}")
    assert step["loops"] == 0
    assert step["copied"] == 0


@pytest.mark.parametrize("form", ["op", "chain"])
def test_the_guard_costs_less_than_optax_s_on_a_tpu(figures, form):
    step = figures(f"optloss/tpu/clip+guard/{SIZE}/{form}")
    optax_s = figures(f"optax/tpu/clip+guard/{SIZE}")
    # The compiler's own scratch memory counts, too, whatever the size of the leaves.
    assert step["temporaries"] <= 1.05 * optax_s["temporaries"] + 2_000_000
    assert step["cycles"] <= optax_s["cycles"]


@pytest.mark.parametrize(
    "program", [f"h100/noise+clip+guard/{SIZE}", f"tpu/noise+clip+guard/{SIZE}/op"]
)
def test_the_program_does_not_depend_on_the_host(figures, program):
    one, two = figures(f"optloss/{program}", cpus=1), figures(f"optloss/{program}")
    assert one["hlo"] == two["hlo"]


@pytest.mark.parametrize("target", ["h100", "tpu"])
@pytest.mark.parametrize("parameters", [8192, 8])
def test_the_norm_of_known_gradients_is_folded_right(
    figures, compilers, benchmarks, target, parameters
):
    step = figures(f"optloss/{target}/known/{parameters}/2")
    constants = benchmarks("programs").magnitudes(parameters)
    seen = compilers.constants(step["hlo"])[-2 * len(constants) :]
    norms, skipped = seen[::2], seen[1::2]
    assert skipped == [0] * len(constants)
    assert norms == [
        pytest.approx(constant * math.sqrt(parameters), rel=1e-4, abs=0)
        for constant in constants
    ]


def test_a_jitted_init_spreads_the_moments_on_a_tpu(compilers):
    if lacking := compilers.missing("tpu"):
        pytest.skip(f"compiling for a TPU takes {' and '.join(lacking)}")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=spread)}
    op = optloss.optimize_loss(lambda p: jnp.sum(p["w"]), 0, 0.1, "adam")
    lowered = jax.jit(op.init).trace(params).lower(lowering_platforms=("tpu",))
    made = lowered.compile().output_shardings
    assert made.opt_state.optimizer.inner[0].mu["w"].is_equivalent_to(spread, 2)


THUNKS = """\
000: kCommandBuffer [source       | next=011 (1)]
    001: kCopy         [source       | next=002 (1)] kCopy
    002: kConditional  [source       | next=003 (1)]
condition:
    No thunks.  body:
    003: kCustomKernel [source       | sink        ] loop_fusion
004: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    No thunks.  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source       | next=013 (1)] reduce_fusion
    006: kConditional  [source       | sink        ]
007: kKernel        [source       | sink        ] wrapped_add
"""

HLO = """\
HloModule m, input_output_alias={ {0}: (0, {}, may-alias), {2}: (1, {}, must-alias) }

%fused (p: f32[]) -> (f32[], f32[]) {
  %p = f32[]{:T(128)} parameter(0)
  %two = f32[] constant(2.5e+30)
  ROOT %t = (f32[], f32[]) tuple(%p, %two)
}

%body.1 (x: f32[8]) -> f32[8] {
  ROOT %k = f32[8]{0} add(%x, %x), backend_config={"estimated_cycles":"7"}
}

%near (x: f32[8]) -> f32[8] {
  ROOT %k.2 = f32[8]{0} add(%x, %x), backend_config={"estimated_cycles":"30"}
}

%far (x: f32[8]) -> f32[8] {
  ROOT %k.3 = f32[8]{0} add(%x, %x), backend_config={"estimated_cycles":"200"}
}

ENTRY %main.4 (a: f32[8], b: f32[8]) -> (f32[8], f32[], f32[]) {
  %a = f32[8]{0:T(128)} parameter(0)
  %one = f32[] constant(-inf)
  %f = (f32[], f32[]) fusion(%one), calls=%fused, config={"estimated_cycles":"1000"}
  %g.0 = f32[] get-tuple-element(%f), index=0
  %g.1 = f32[] get-tuple-element(%f), index=1
  %w = f32[8]{0} while(%a), condition=%far, body=%body.1
  %c = f32[8]{0} conditional(%one, %a, %a), branch_computations={%near, %far}
  %n = pred[] constant(false)
  ROOT %out = (f32[8], f32[], f32[]) tuple(%c, %g.0, %g.1, %n)
}
"""


def test_what_is_read_off_a_list_of_thunks(compilers):
    found = compilers.launches(THUNKS)
    assert found == {"launches": 3, "host_waits": 2, "kernels": 3, "copies": 1}


def test_what_is_read_off_a_program(compilers):
    assert compilers.cycles(HLO) == 1000 + (200 + 7) + max(30, 200)
    assert compilers.constants(HLO) == [None, -math.inf, 2.5e30, 0]


def test_arrays_that_are_not_updated_in_place_are_counted(compilers):
    state = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4,), (3,), (5, 2))]
    assert compilers.copied(HLO, state) == 3 * 4
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    assert compilers.copied(HLO, [state[0], scalar, state[2]]) == 0


def test_bars(targets):
    absolute = targets.Bar("launches", 2)
    assert absolute.excess(2, 0) == ""
    assert absolute.excess(3, 0) == "launches 3, at most 2"
    rounded = targets.Bar("bytes", 0, 1.01, "clip", decimals=2)
    assert rounded.excess(101.4, 100) == ""
    assert rounded.excess(101.6, 100) == "bytes 102, at most 101 (1.01 of optax's clip)"
    more = targets.Bar("temporaries", 1e6, 1, "clip")
    assert more.excess(1e6 + 5, 5) == ""
    assert more.excess(1e6 + 6, 5) == (
        "temporaries 1,000,006, at most 1,000,005 (1 of optax's clip and 1,000,000)"
    )


def test_the_docs_print_what_was_compiled(targets):
    last = json.loads(targets.RESULTS.read_text())
    assert [row["cell"] for row in last["cells"]] == [c.name for c in targets.CELLS]
    printed = targets.page(targets.CELLS, last["programs"])
    assert targets.TABLES.read_text() == printed


NETWORK = """\
import json
import sys

import jax
import jax.numpy as jnp

import optloss

sys.path.insert(0, sys.argv[1])
import compilers


def loss(params, x):
    for w in params:
        x = jnp.tanh(x.astype(w.dtype) @ w)
    return jnp.mean(x.astype("float32") ** 2)


rows, dtype, options = int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
train_op = optloss.optimize_loss(
    loss, global_step=0, learning_rate=0.1, optimizer="adam", **options
)


def build(devices):
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    params = [jax.ShapeDtypeStruct((256, 256), dtype)] * 8
    x = jax.ShapeDtypeStruct((rows, 256), "float32")
    shapes = (jax.eval_shape(train_op.init, params), x)
    return train_op.update, jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )


print(json.dumps(compilers.compile_h100(build)[0]))
"""


@pytest.fixture(scope="module")
def for_h100(compilers):
    """Return the figures of a training op's step of a deep network."""

    def of(rows, options, dtype="float32"):
        if lacking := compilers.missing("h100"):
            pytest.skip(f"compiling for h100 takes {' and '.join(lacking)}")
        # In a process of its own: without a GPU, JAX has the plugin if told so before.
        done = subprocess.run(
            [sys.executable, "-c", NETWORK, str(BENCHMARKS), str(rows), dtype, options],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return of


def test_accumulation_saves_activations_on_a_gpu(for_h100):
    whole, slices = (
        for_h100(16384, f"{{'value_and_grad': optloss.accumulate_gradients({steps})}}")
        for steps in (1, 4)
    )
    assert slices["temporaries"] <= 0.35 * whole["temporaries"]


def test_a_dynamic_loss_scale_needs_no_host_and_no_copy_on_a_gpu(for_h100):
    guarded = "'clip_gradients': 1.0, 'skip_nonfinite': True"
    plain = for_h100(64, f"{{{guarded}}}", "float16")
    scale = "'loss_scale': optloss.dynamic_loss_scale()"
    scaled = for_h100(64, f"{{{guarded}, {scale}}}", "float16")
    assert scaled["host_waits"] == plain["host_waits"] == 0
    assert scaled["copied"] == plain["copied"]
    assert scaled["temporaries"] <= plain["temporaries"] + 8 * 256 * 256 * 2
