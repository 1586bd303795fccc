"""The original's algorithm once more: NumPy, float64, gradients by hand, a plain loop.

It shares no line with the library and none with JAX, so that both can be held to it.
``restate(run)`` follows one recorded run and returns the arrays a recording has. In
TensorFlow the hyper-parameters of a float64 run are still float32 numbers:
``constant=as_float32`` restates that, too, and meets the recordings to the last bits.
"""

import numpy as np


def as_float32(number):
    return float(np.float32(number))


def perceptron(data, names, params, k, weight):
    first, first_bias, second, second_bias = (params[name] for name in names)
    x, y = np.float64(data["data/x"][k]), np.float64(data["data/y"][k])
    hidden = np.tanh(x @ first + first_bias)
    residual = hidden @ second + second_bias - y
    slope = weight * 2 * residual / residual.size
    inner = (slope @ second.T) * (1 - hidden**2)
    grads = [x.T @ inner, inner.sum(0), hidden.T @ slope, slope.sum(0)]
    return weight * np.mean(residual**2), dict(zip(names, grads, strict=True))


def quadratic(data, names, params, k, weight):
    del k
    loss, grads = 0.0, {}
    for name in names:
        if f"data/h_{name}" in data:
            h = np.float64(data[f"data/h_{name}"])
            error = params[name] - np.float64(data[f"data/t_{name}"])
            loss += weight * 0.5 * np.sum(h * error**2)
            grads[name] = weight * h * error
    return loss, grads


def loss_and_gradients(run, params, k):
    problem = perceptron if "data/x" in run.data else quadratic
    weight = float(run.data[f"weights/{run.case['weights']}"][k])
    return problem(run.data, run.names, params, k, weight)


def sgd(slots, w, g, lr):
    del slots
    return w - lr * g


def momentum(slots, w, g, lr, momentum=0.9, use_nesterov=False):
    a = slots["a"] = momentum * slots.get("a", 0.0) + g
    return w - lr * (g + momentum * a if use_nesterov else a)


def adagrad(slots, w, g, lr, initial_accumulator_value=0.1):
    a = slots["a"] = slots.get("a", initial_accumulator_value) + g**2
    return w - lr * g / np.sqrt(a)


def adam(slots, w, g, lr, beta1=0.9, beta2=0.999, epsilon=1e-8, constant=float):
    m = slots["m"] = beta1 * slots.get("m", 0.0) + (1 - beta1) * g
    v = slots["v"] = beta2 * slots.get("v", 0.0) + (1 - beta2) * g**2
    p1, p2 = slots.get("p1", beta1), slots.get("p2", beta2)
    slots["p1"], slots["p2"] = constant(p1 * beta1), constant(p2 * beta2)
    return w - lr * np.sqrt(1 - p2) / (1 - p1) * m / (np.sqrt(v) + epsilon)


def rmsprop(slots, w, g, lr, decay=0.9, momentum=0.0, epsilon=1e-10, centered=False):
    ms = slots["ms"] = decay * slots.get("ms", 1.0) + (1 - decay) * g**2
    mg = slots["mg"] = decay * slots.get("mg", 0.0) + (1 - decay) * g
    variance = ms - mg**2 if centered else ms
    step = lr * g / np.sqrt(variance + epsilon)
    slots["mom"] = momentum * slots.get("mom", 0.0) + step
    return w - slots["mom"]


def ftrl(
    slots,
    w,
    g,
    lr,
    learning_rate_power=-0.5,
    initial_accumulator_value=0.1,
    l1_regularization_strength=0.0,
    l2_regularization_strength=0.0,
    l2_shrinkage_regularization_strength=0.0,
):
    n = slots.get("n", initial_accumulator_value)
    slots["n"] = n + g**2
    old, new = n**-learning_rate_power, slots["n"] ** -learning_rate_power
    shrunk = g + 2 * l2_shrinkage_regularization_strength * w
    z = slots["z"] = slots.get("z", 0.0) + shrunk - (new - old) / lr * w
    l1 = l1_regularization_strength
    solved = (np.sign(z) * l1 - z) / (new / lr + 2 * l2_regularization_strength)
    return np.where(np.abs(z) > l1, solved, 0.0)


OPTIMIZERS = {
    "SGD": sgd,
    "Momentum": momentum,
    "Adagrad": adagrad,
    "Adam": adam,
    "RMSProp": rmsprop,
    "Ftrl": ftrl,
}
HELD_AS_FLOAT32 = {
    "Momentum": {"momentum": 0.9},
    "Adam": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "RMSProp": {"decay": 0.9, "momentum": 0.0, "epsilon": 1e-10},
    "Ftrl": {
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "l2_shrinkage_regularization_strength": 0.0,
    },
}


def optimizer_of(case, constant):
    chosen = case["optimizer"]
    name = chosen if isinstance(chosen, str) else chosen["class"]
    settings = {} if isinstance(chosen, str) else dict(chosen.get("kwargs") or {})
    for key, default in HELD_AS_FLOAT32.get(name, {}).items():
        settings[key] = constant(settings.get(key, default))
    if name == "Adam":
        settings["constant"] = constant
    return OPTIMIZERS[name], settings


def exponential_decay(lr, s, decay_steps, decay_rate, staircase=False):
    p = s / decay_steps
    return lr * decay_rate ** (np.floor(p) if staircase else p)


def natural_exp_decay(lr, s, decay_steps, decay_rate, staircase=False):
    p = s / decay_steps
    return lr * np.exp(-decay_rate * (np.floor(p) if staircase else p))


def inverse_time_decay(lr, s, decay_steps, decay_rate, staircase=False):
    p = s / decay_steps
    return lr / (1 + decay_rate * (np.floor(p) if staircase else p))


def polynomial_decay(
    lr, s, decay_steps, end_learning_rate=1e-4, power=1.0, cycle=False
):
    if cycle:
        decay_steps = decay_steps * max(1.0, np.ceil(s / decay_steps))
    p = min(s, decay_steps) / decay_steps
    return (lr - end_learning_rate) * (1 - p) ** power + end_learning_rate


def cosine(periods):
    return 0.5 * (1 + np.cos(2 * np.pi * periods))


def cosine_decay(lr, s, decay_steps, alpha=0.0):
    p = min(s, decay_steps) / decay_steps
    return lr * ((1 - alpha) * cosine(p / 2) + alpha)


def cosine_decay_restarts(lr, s, first_decay_steps, t_mul=2.0, m_mul=1.0, alpha=0.0):
    c = s / first_decay_steps
    if t_mul == 1.0:
        i = np.floor(c)
        c -= i
    else:
        i = np.floor(np.log(1 - c * (1 - t_mul)) / np.log(t_mul))
        c = (c - (1 - t_mul**i) / (1 - t_mul)) / t_mul**i
    return lr * ((1 - alpha) * m_mul**i * cosine(c / 2) + alpha)


def linear_cosine_decay(lr, s, decay_steps, num_periods=0.5, alpha=0.0, beta=0.001):
    p = min(s, decay_steps) / decay_steps
    return lr * ((alpha + 1 - p) * cosine(num_periods * p) + beta)


def noisy_linear_cosine_decay(lr, s, decay_steps, initial_variance=1.0, **settings):
    if initial_variance:
        raise ValueError("a drawn rate cannot be restated: play the stored one")
    return linear_cosine_decay(lr, s, decay_steps, **settings)


def piecewise_constant(lr, s, boundaries, values):
    del lr
    return values[sum(s > boundary for boundary in boundaries)]


DECAYS = {
    fn.__name__: fn
    for fn in (
        exponential_decay,
        natural_exp_decay,
        inverse_time_decay,
        polynomial_decay,
        cosine_decay,
        cosine_decay_restarts,
        linear_cosine_decay,
        noisy_linear_cosine_decay,
        piecewise_constant,
    )
}


def rate_of(run, k, s, constant):
    case, decay = run.case, run.case.get("decay")
    if case["optimizer_form"] == "instance":
        return as_float32(case["optimizer"]["instance_lr"])
    if "random_lr" in case["tags"]:
        return float(run.recorded["lr"][k])
    lr = case["lr"] if case["lr_kind"] == "tensor" else as_float32(case["lr"])
    if not decay:
        return lr
    held = {
        key: constant(value) if isinstance(value, float) else value
        for key, value in decay["args"].items()
    }
    return DECAYS[decay["fn"]](lr, s, **held)


def global_norm(grads):
    return np.sqrt(sum(np.sum(g**2) for g in grads.values()))


def clip_factor(norm, bound):
    with np.errstate(divide="ignore", invalid="ignore"):
        return bound * np.minimum(1 / norm, 1 / np.float64(bound))


def adapt(averages, norm, s, settings, constant):
    d, epsilon = settings["decay"], settings["epsilon"]
    if settings["use_global_step"]:
        d = min(d, constant(s / (s + 1)))
    new = constant(1 - constant(d))
    log_norm = np.log(norm + epsilon)
    averages["m"] -= new * (averages["m"] - log_norm)
    averages["q"] -= new * (averages["q"] - log_norm**2)
    std = np.sqrt(max(epsilon, averages["q"] - averages["m"] ** 2))
    return np.exp(averages["m"] + settings["std_factor"] * std)


def adaptive_factor(averages, norm, max_norm, static_max_norm):
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = 1.0 if norm < max_norm else np.exp(averages["m"]) / norm
        if static_max_norm is None:
            return factor
        return min(static_max_norm / norm, factor)


def disturb(run, grads, k, constant):
    noise, multipliers = run.case.get("noise"), run.case.get("multipliers") or {}
    for name in grads:
        if noise is not None:
            grads[name] = grads[name] + constant(noise) * run.recorded[f"z/{name}"][k]
        if name in multipliers:
            grads[name] = grads[name] * constant(multipliers[name])
    return grads


def clip(case, grads, averages, s, constant):
    bound, norm = case.get("clip"), global_norm(grads)
    measured = {"grad_norm": norm}
    if bound is None:
        return grads, measured
    if isinstance(bound, dict):
        settings = bound["adaptive"]
        max_norm = adapt(averages, norm, s, settings, constant)
        static = settings["static_max_norm"]
        factor = adaptive_factor(averages, norm, max_norm, static)
        measured |= {"max_norm": max_norm}
        measured |= {"ad_mean": averages["m"], "ad_sq_mean": averages["q"]}
    else:
        factor = clip_factor(norm, bound)
    grads = {name: g * factor for name, g in grads.items()}
    return grads, measured | {"clipped_norm": global_norm(grads)}


def restate(run, constant=float):
    case, s = run.case, run.case["global_step0"]
    update, settings = optimizer_of(case, constant)
    params = {name: np.float64(run.data[f"init/{name}"]) for name in run.names}
    slots = {name: {} for name in run.names}
    averages = {"m": 0.0, "q": 0.0}
    rows = []
    for k in range(run.updates):
        loss, grads = loss_and_gradients(run, params, k)
        trained = case.get("variables") or grads
        grads = {name: g for name, g in grads.items() if name in trained}
        grads = disturb(run, grads, k, constant)
        grads, measured = clip(case, grads, averages, s, constant)
        lr = rate_of(run, k, s, constant)
        for name, g in grads.items():
            params[name] = update(slots[name], params[name], g, lr, **settings)
        s += case["increment_global_step"]
        after = {f"param/{name}": value for name, value in params.items()}
        rows.append({"loss": loss, "lr": lr, "global_step": s} | measured | after)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}
