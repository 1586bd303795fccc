"""The clips by history once more: NumPy, float64, plain loops, from the papers.

Each takes the norms of a run and returns, a row an update, what became of them and what
was in the statistics. Where the library says that it differs from a paper, so does the
function here, at the lines that begin with ``if not``; ``published=True`` takes those
away.
"""

import numpy as np


def zclip(norms, z_threshold=2.5, alpha=0.97, warmup=25, mode="adaptive"):
    """Algorithm 1 of arXiv:2504.02507: (clipped, threshold, mean, deviation)."""
    buffer, mean, var, rows = [], 0.0, 0.0, []
    for norm in norms:
        std = np.sqrt(var)
        initialised = len(buffer) == warmup
        threshold = mean + z_threshold * std if initialised else np.inf
        clipped = norm
        if np.isfinite(norm) and norm > threshold:
            z = (norm - mean) / std if std else np.inf
            clipped = {
                "adaptive": mean + z_threshold**2 / z * std,
                "mean": mean,
                "threshold": threshold,
            }[mode]
        if not np.isfinite(norm):
            pass
        elif not initialised:
            buffer.append(norm)
            mean, var = np.mean(buffer), np.var(buffer)
        else:
            mean = alpha * mean + (1 - alpha) * clipped
            var = alpha * var + (1 - alpha) * (clipped - mean) ** 2
        rows.append((clipped, threshold, mean, np.sqrt(var)))
    return [np.array(column) for column in zip(*rows, strict=True)]


def autoclip(norms, percentile=10, history=1024):
    """Section 3 of arXiv:2007.14469: (clipped, threshold)."""
    seen, rows = [], []
    for norm in norms:
        if not np.isfinite(norm):
            threshold = np.percentile(seen, percentile) if seen else np.inf
            rows.append((norm, threshold))
            continue
        seen = [*seen, norm][-history:]
        threshold = np.percentile(seen, percentile)
        rows.append((min(norm, threshold), threshold))
    return [np.array(column) for column in zip(*rows, strict=True)]


def adagc(
    norms, relative=1.04, beta=0.99, warmup=100, absolute=1.0, *, published=False
):
    """Algorithm 1 of arXiv:2502.11034, of norms [updates, leaves]: (clipped, means)."""
    means, observed, rows = np.full(norms.shape[1], np.inf), 0, []
    for leaves in norms:
        total = np.sqrt(np.sum(leaves**2))
        if not published and not np.isfinite(total):
            rows.append((leaves, means))
            continue
        clipped, means = leaves.copy(), means.copy()
        for i, norm in enumerate(leaves):
            if observed < warmup:
                clipped[i] = norm * min(1, absolute / total)
            elif not published and means[i] == np.inf:
                clipped[i] = min(norm, absolute)
            else:
                clipped[i] = min(norm, relative * means[i])
            if not published and clipped[i] == 0:
                continue
            if observed < warmup or means[i] == np.inf:
                means[i] = min(means[i], clipped[i])
            else:
                means[i] = beta * means[i] + (1 - beta) * clipped[i]
        observed += 1
        rows.append((clipped, means))
    return [np.array(column) for column in zip(*rows, strict=True)]


def agc(gradients, weights, clipping=0.01, epsilon=1e-3):
    """Equation 3 of arXiv:2102.06171, of one leaf, unit by unit."""
    if np.ndim(weights) < 2:
        units = [...]
    else:
        units = [(..., i) for i in range(weights.shape[-1])]
    clipped = np.array(gradients)
    for unit in units:
        most = clipping * max(np.linalg.norm(np.ravel(weights[unit])), epsilon)
        norm = np.linalg.norm(np.ravel(clipped[unit]))
        if norm > most:
            clipped[unit] *= most / norm
    return clipped
