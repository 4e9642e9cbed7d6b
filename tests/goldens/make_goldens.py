"""The golden vectors of our own: an oracle of loops in NumPy float64 that imports nothing of rq_jax.

`python tests/goldens/make_goldens.py` writes quantize.npz, sampling.npz and transformer.npz beside itself.
The functions also serve the tests as an independent second opinion.
"""

import math
from pathlib import Path

import numpy as np

COUNT_EPSILON = 1e-5


# --- quantisation ---------------------------------------------------------------------------------


def distances(x_E, table_KE):
    """Squared distances (K,) of one vector to all codes."""
    pairs = [zip(x_E, row, strict=True) for row in table_KE]
    return np.array([sum((float(a) - float(b)) ** 2 for a, b in pair) for pair in pairs])


def nearest(x_E, table_KE):
    """First index of the smallest distance."""
    best, best_distance = 0, math.inf
    for k, distance in enumerate(distances(x_E, table_KE)):
        if distance < best_distance:
            best, best_distance = k, distance
    return best


def margin(x_E, table_KE):
    """How much farther the second nearest code is than the nearest."""
    first, second = np.sort(distances(x_E, table_KE))[:2]
    return second - first


def residual_quantize(x_NE, tables):
    """Codes (N, D), partial sums (N, D, E), soft codes at temperature 0.5 and the smallest margin."""
    N, E, D, K = *x_NE.shape, len(tables), max(len(table) for table in tables)
    codes, sums, soft = np.zeros((N, D), int), np.zeros((N, D, E)), np.zeros((N, D, K))
    smallest = math.inf
    for n in range(N):
        residual, total = x_NE[n].astype(float), np.zeros(E)
        for d, table_KE in enumerate(tables):
            codes[n, d] = nearest(residual, table_KE)
            smallest = min(smallest, margin(residual, table_KE))
            soft[n, d, : len(table_KE)] = softmax(-distances(residual, table_KE) / 0.5)
            total = total + table_KE[codes[n, d]]
            residual = residual - table_KE[codes[n, d]]
            sums[n, d] = total
    return codes, sums, soft, smallest


def ema_update(state, x_NE, codes_N, decay, candidates_KE=None):
    """(codebook, counts, sums) after one update."""
    _, counts_K, sums_KE = (array.astype(float) for array in state)
    K = len(counts_K)
    counts, sums = np.zeros(K), np.zeros_like(sums_KE)
    for x_E, k in zip(x_NE, codes_N, strict=True):
        counts[k] += 1
        sums[k] += x_E
    for k in range(K):
        counts[k] = decay * counts_K[k] + (1 - decay) * counts[k]
        sums[k] = decay * sums_KE[k] + (1 - decay) * sums[k]
        if candidates_KE is not None and counts[k] < 1 - 1e-9:
            counts[k], sums[k] = 1.0, candidates_KE[k]
    n = counts.sum()
    smoothed = [n * (counts[k] + COUNT_EPSILON) / (n + K * COUNT_EPSILON) for k in range(K)]
    return np.stack([sums[k] / smoothed[k] for k in range(K)]), counts, sums


def train_sequential(x_NE, state, depth, decay, candidates=None):
    """One training call on a shared codebook, updated after every depth: codes, partial sums, new state."""
    residuals, totals = x_NE.astype(float), np.zeros(x_NE.shape)
    codes, sums, smallest = [], [], math.inf
    for d in range(depth):
        table_KE = state[0].astype(float)
        codes_N = np.array([nearest(residual, table_KE) for residual in residuals])
        smallest = min(smallest, min(margin(residual, table_KE) for residual in residuals))
        state = ema_update(state, residuals, codes_N, decay, None if candidates is None else candidates[d])
        residuals, totals = residuals - table_KE[codes_N], totals + table_KE[codes_N]
        codes.append(codes_N)
        sums.append(totals)
    return np.stack(codes, -1), np.stack(sums, -2), state, smallest


# --- sampling -------------------------------------------------------------------------------------


def softmax(values):
    """Softmax of one row; -inf is allowed."""
    exps = [math.exp(value - max(values)) for value in values]
    return np.array([e / sum(exps) for e in exps])


def filter_row(logits_K, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (K,) of one row: temperature, top-k, softmax, top-p, renormalised."""
    values = [-math.inf if math.isnan(value) else float(value) for value in logits_K]
    K = len(values)
    if temperature == 0:
        return np.eye(K)[values.index(max(values))]
    values = [value / temperature for value in values]
    if top_k is not None:
        threshold = sorted(values, reverse=True)[min(top_k, K) - 1]
        values = [value if value >= threshold else -math.inf for value in values]
    probabilities = softmax(values)
    if top_p is None or top_p == 1:
        return probabilities
    kept, total = np.zeros(K), 0.0
    for k in sorted(range(K), key=lambda k: (-probabilities[k], k)):
        kept[k] = probabilities[k]
        total += probabilities[k]
        if total >= top_p:
            break
    return kept / kept.sum()


# --- transformer ----------------------------------------------------------------------------------


def layer_norm(x_M, p):
    """LayerNorm with epsilon 1e-5."""
    mean = sum(x_M) / len(x_M)
    variance = sum((value - mean) ** 2 for value in x_M) / len(x_M)
    return (x_M - mean) / math.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def gelu(x):
    """x times the normal distribution function of x."""
    return np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])


def block(x_SM, p):
    """One pre-norm layer; a query sees its own and earlier positions."""
    normed = np.stack([layer_norm(x_M, p["norm1"]) for x_M in x_SM])
    _, N, A = p["qkv_bias_3NA"].shape
    out = np.zeros_like(x_SM)
    for s in range(len(x_SM)):
        for n in range(N):
            query, key, value = (
                np.stack([row @ p["qkv_M3NA"][:, i, n] + p["qkv_bias_3NA"][i, n] for row in normed[: s + 1]])
                for i in range(3)
            )
            weights = softmax([query[s] @ key[t] / math.sqrt(A) for t in range(s + 1)])
            mixed = sum(weights[t] * value[t] for t in range(s + 1))
            out[s] += mixed @ p["out_NAM"][n]
        out[s] += p["out_bias_M"]
    x_SM = x_SM + out
    hidden = [gelu(layer_norm(x_M, p["norm2"]) @ p["up_MF"] + p["up_bias_F"]) for x_M in x_SM]
    return x_SM + np.stack([row @ p["down_FM"] + p["down_bias_M"] for row in hidden])


def stack(x_SM, p):
    """All layers; the leading axis of each parameter counts them."""
    for layer in range(len(p["blocks"]["up_MF"])):
        x_SM = block(x_SM, pick(p["blocks"], layer))
    return x_SM


def pick(tree, layer):
    """The parameters of one layer."""
    return {k: pick(v, layer) if isinstance(v, dict) else v[layer] for k, v in tree.items()}


def transformer(codes_TD, cond_U, codebook_KE, p):
    """Logits (T, D, K) and condition logits (U-1, V) of one picture; switches as in the released models."""
    T, D = codes_TD.shape
    U = len(cond_U)
    vectors = codebook_KE[codes_TD]
    tokens = [p["cond_embedding_VM"][cond_U[u]] + p["cond_position_UM"][u] for u in range(U)]
    for t in range(T - 1):
        embedded = sum(vectors[t, d] @ p["input_EM"] + p["input_bias_M"] for d in range(D))
        tokens.append(embedded + p["position_TM"][t])
    outputs = stack(np.stack(tokens), p["spatial_stack"])
    logits = []
    for t in range(T):
        slots = [outputs[U - 1 + t]]
        for d in range(1, D):
            slots.append(sum(vectors[t, :d]) @ p["depth_input_EM"] + p["depth_input_bias_M"])
        hidden = stack(np.stack(slots) + p["depth_position_DM"], p["depth_stack"])
        normed = [layer_norm(row, p["classifier_norm"]) for row in hidden]
        logits.append([row @ p["classifier_MK"] + p["classifier_bias_K"] for row in normed])
    normed = [layer_norm(outputs[u], p["cond_classifier_norm"]) for u in range(U - 1)]
    cond_logits = [row @ p["cond_classifier_MV"] + p["cond_classifier_bias_V"] for row in normed]
    return np.array(logits), np.array(cond_logits)


# --- the files ------------------------------------------------------------------------------------


def quantize_golden(rng):
    """Quantisation of 13 vectors at depth 4, soft codes, three training calls with and without restart."""
    x, codebook = _normal(rng, 13, 6), _normal(rng, 7, 6)
    tables = [_normal(rng, K, 6) for K in (7, 5, 3)]
    out = {"x": x, "codebook": codebook, **{f"table{d}": table for d, table in enumerate(tables)}}
    for name, used in (("shared", [codebook] * 4), ("unequal", tables)):
        codes, sums, soft, smallest = residual_quantize(x, used)
        assert smallest > 1e-3, f"{name}: margin {smallest} is too small to compare codes exactly"
        out |= {f"{name}.codes": codes, f"{name}.partial_sums": sums, f"{name}.soft_codes": soft}
    batches, candidates = _normal(rng, 3, 13, 6), _normal(rng, 3, 4, 7, 6)
    out |= {"batches": batches, "candidates": candidates}
    for name, rows in (("plain", None), ("restart", candidates)):
        state = (codebook, np.linspace(0.6, 3.0, 7), codebook * np.linspace(0.6, 3.0, 7)[:, None])
        for step in range(3):
            restart = None if rows is None else rows[step]
            codes, sums, state, smallest = train_sequential(batches[step], state, 4, 0.9, restart)
            assert smallest > 1e-4, f"{name}: margin {smallest} is too small to compare codes exactly"
            out |= {f"{name}{step}.codes": codes, f"{name}{step}.partial_sums": sums}
            parts = zip(("codebook", "counts", "sums"), state, strict=True)
            out |= {f"{name}{step}.{part}": array for part, array in parts}
    return out


FILTERS = [  # temperature, top_k, top_p
    (1.0, None, None), (0.7, 5, None), (1.3, None, 0.8), (0.9, 6, 0.6), (0.0, 3, 0.5), (2.0, 40, 0.0),
    (1.0, 1, 1.0),
]  # fmt: skip


def sampling_golden(rng):
    """Filtered distributions of five rows under each of `FILTERS`; one row has ties, one -inf, one NaN."""
    logits = 2 * _normal(rng, 5, 11)
    logits[1] = np.round(logits[1])
    logits[2, [0, 4]] = -np.inf
    logits[3, 7] = np.nan
    probabilities = [[filter_row(row, *values) for row in logits] for values in FILTERS]
    return {"logits": logits, "probabilities": np.array(probabilities)}


def transformer_golden(rng):
    """A text model: 2 pictures of 2 x 3 positions and depth 3, 7 codes, 4 condition tokens out of 9."""
    E, M, N, A, K, V, U, T, D = 5, 8, 2, 4, 7, 9, 4, 6, 3

    def layers(L):
        norm = lambda: {"scale": 1 + _normal(rng, L, M) / 4, "bias": _normal(rng, L, M) / 4}  # noqa: E731
        shapes = {
            "qkv_M3NA": (M, 3, N, A), "qkv_bias_3NA": (3, N, A), "out_NAM": (N, A, M), "out_bias_M": (M,),
            "up_MF": (M, 4 * M), "up_bias_F": (4 * M,), "down_FM": (4 * M, M), "down_bias_M": (M,),
        }  # fmt: skip
        weights = {name: _normal(rng, L, *shape) / 2 for name, shape in shapes.items()}
        return {"blocks": {"norm1": norm(), "norm2": norm(), **weights}}

    norm = lambda: {"scale": 1 + _normal(rng, M) / 4, "bias": _normal(rng, M) / 4}  # noqa: E731
    shapes = {
        "cond_embedding_VM": (V, M), "cond_position_UM": (U, M), "position_TM": (T, M),
        "depth_position_DM": (D, M),
        "input_EM": (E, M), "input_bias_M": (M,), "depth_input_EM": (E, M), "depth_input_bias_M": (M,),
        "classifier_MK": (M, K), "classifier_bias_K": (K,), "cond_classifier_MV": (M, V),
        "cond_classifier_bias_V": (V,),
    }  # fmt: skip
    params = {name: _normal(rng, *shape) / 2 for name, shape in shapes.items()}
    params |= {"classifier_norm": norm(), "cond_classifier_norm": norm()}
    params |= {"spatial_stack": layers(2), "depth_stack": layers(1)}
    codes, cond, codebook = rng.integers(0, K, (2, T, D)), rng.integers(0, V, (2, U)), _normal(rng, K, E)
    double = _map(lambda array: array.astype(float), params)
    logits, cond_logits = zip(
        *(transformer(codes[b], cond[b], codebook.astype(float), double) for b in range(2)), strict=True
    )
    flat = {f"params.{name}": array for name, array in flatten(params).items()}
    return {"codes": codes, "cond": cond, "codebook": codebook, "logits": np.stack(logits),
            "cond_logits": np.stack(cond_logits), **flat}  # fmt: skip


def flatten(tree, prefix=""):
    """Nested dicts to one dict with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _map(function, tree):
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


def _normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


GOLDENS = {"quantize": quantize_golden, "sampling": sampling_golden, "transformer": transformer_golden}


def make(name):
    """The arrays of one file."""
    return GOLDENS[name](np.random.default_rng(7))


if __name__ == "__main__":
    for name in GOLDENS:
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **make(name))
