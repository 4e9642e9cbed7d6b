"""The golden vectors of our own: an oracle of loops in NumPy float64 that imports nothing of rq_jax.

`python tests/goldens/make_goldens.py` writes one .npz for each of `GOLDENS` beside itself.
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


# --- adversary and judges -------------------------------------------------------------------------


def convolve(x_HWC, p, stride):
    """4x4 convolution with zero padding of 1; "bias" may be absent."""
    kernel, padded = p["kernel"], np.pad(x_HWC, ((1, 1), (1, 1), (0, 0)))
    rows, columns = ((size - 4) // stride + 1 for size in padded.shape[:2])
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = padded[i * stride : i * stride + 4, j * stride : j * stride + 4]
            for o in range(kernel.shape[-1]):
                out[i, j, o] = (patch * kernel[..., o]).sum()
    return out + p.get("bias", 0.0)


def moments(maps, c):
    """Mean, sum of squared deviations and number of the values of channel c in all maps."""
    values = [float(value) for x_HWC in maps for value in x_HWC[..., c].ravel()]
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values), len(values)


def batch_norm(maps, p, statistics, train):
    """(maps, running statistics) after BatchNorm."""
    maps, after = [x_HWC.copy() for x_HWC in maps], {k: v.copy() for k, v in statistics.items()}
    for c in range(len(p["scale"])):
        mean, variance = statistics["mean"][c], statistics["var"][c]
        if train:
            mean, squares, count = moments(maps, c)
            variance = squares / count
            after["mean"][c] = 0.9 * statistics["mean"][c] + 0.1 * mean
            after["var"][c] = 0.9 * statistics["var"][c] + 0.1 * squares / (count - 1)
        for x_HWC in maps:
            x_HWC[..., c] = (x_HWC[..., c] - mean) / math.sqrt(variance + 1e-5) * p["scale"][c] + p["bias"][c]
    return maps, after


def act_norm_values(maps):
    """Shift and scale that ActNorm takes from its first batch."""
    values = [moments(maps, c) for c in range(maps[0].shape[-1])]
    shift = np.array([-mean for mean, _, _ in values])
    return {"shift": shift, "scale": np.array([1 / (math.sqrt(sq / (n - 1)) + 1e-6) for _, sq, n in values])}


def discriminator(images, p, num_layers, statistics=None, train=False, initialize=False):
    """(logits, statistics or ActNorm values after the pass); ActNorm where there are no statistics."""
    maps, after = list(images.astype(float)), {}
    for n in range(num_layers + 2):
        maps = [convolve(x_HWC, p[f"conv{n}"], 2 if n < num_layers else 1) for x_HWC in maps]
        norm = f"norm{n}"
        if norm in p and statistics is not None:
            maps, after[norm] = batch_norm(maps, p[norm], statistics[norm], train)
        elif norm in p:
            after[norm] = act_norm_values(maps) if initialize else p[norm]
            maps = [after[norm]["scale"] * (x_HWC + after[norm]["shift"]) for x_HWC in maps]
        if n <= num_layers:
            maps = [np.where(x_HWC > 0, x_HWC, 0.2 * x_HWC) for x_HWC in maps]
    return np.stack(maps), after


def perceptual_distance(blocks, other_blocks, heads):
    """LPIPS of two pictures after the network, from features (H, W, C) by block."""
    total = 0.0
    for x, y, head_C in zip(blocks, other_blocks, heads, strict=True):
        distances = []
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                a, b = (v / (math.sqrt((v**2).sum()) + 1e-10) for v in (x[i, j].astype(float), y[i, j].astype(float)))
                distances.append(sum(w * (p - q) ** 2 for w, p, q in zip(head_C, a, b, strict=True)))
        total += sum(distances) / len(distances)
    return total


def structural_similarity(x_HWC, y_HWC):
    """SSIM of two pictures in [-1, 1], taken to 0..255: Gaussian window of 11x11 with sigma 1.5, wherever it fits."""
    window = np.array([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
    window, found = window / window.sum(), []
    H, W, C = x_HWC.shape
    for c in range(C):
        for i in range(H - 10):
            for j in range(W - 10):
                places = (z[i : i + 11, j : j + 11, c].astype(float) for z in (x_HWC, np.clip(y_HWC, -1, 1)))
                a, b = (127.5 * (place + 1) for place in places)
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + 2.55**2) / (mean_a**2 + mean_b**2 + 2.55**2)
                found.append(luminance * (2 * covariance + 7.65**2) / (var_a + var_b + 7.65**2))
    return sum(found) / len(found)


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


def discriminator_golden(rng):
    """Two layers of stride 2, width 3, pictures of 21x17 with 2 channels; BatchNorm, and ActNorm from its first batch."""
    widths, out = (2, 3, 6, 12, 1), {"images": _normal(rng, 2, 21, 17, 2)}
    for kind in ("batch_norm", "act_norm"):
        names, params, statistics = ("scale", "bias") if kind == "batch_norm" else ("scale", "shift"), {}, {}
        for n in range(4):
            params[f"conv{n}"] = {"kernel": _normal(rng, 4, 4, *widths[n : n + 2]) / 4}
            if n in (0, 3) or kind == "act_norm":
                params[f"conv{n}"]["bias"] = _normal(rng, widths[n + 1])
            if n in (1, 2):
                params[f"norm{n}"] = {name: _normal(rng, widths[n + 1]) for name in names}
                statistics[f"norm{n}"] = {"mean": _normal(rng, widths[n + 1]), "var": _normal(rng, widths[n + 1]) ** 2}
        double = _map(lambda array: array.astype(float), params)
        if kind == "batch_norm":
            before = _map(lambda array: array.astype(float), statistics)
            out |= {f"{kind}.statistics.{name}": array for name, array in flatten(statistics).items()}
            logits, _ = discriminator(out["images"], double, 2, before)
            trained, after = discriminator(out["images"], double, 2, before, train=True)
        else:
            logits, _ = discriminator(out["images"], double, 2)
            trained, after = discriminator(out["images"], double, 2, initialize=True)
        out |= {f"{kind}.params.{name}": array for name, array in flatten(params).items()}
        out |= {f"{kind}.after.{name}": array for name, array in flatten(after).items()}
        out |= {f"{kind}.logits": logits, f"{kind}.train_logits": trained}
    return out


def perceptual_golden(rng):
    """Three blocks of features of two pairs of pictures, one vector all zero; with heads and with equal weights."""
    shapes, out = [(5, 3, 4), (3, 2, 6), (2, 1, 7)], {}
    for block, shape in enumerate(shapes, start=1):
        for name in ("features", "other"):
            out[f"{name}.block{block}"] = np.maximum(_normal(rng, 2, *shape), 0)
        out[f"heads.block{block}"] = np.abs(_normal(rng, shape[-1]))
    out["features.block1"][0, 2, 1] = 0.0
    features, other, heads = ([out[f"{name}.block{b}"] for b in (1, 2, 3)] for name in ("features", "other", "heads"))
    equal = [np.full(shape[-1], 1 / 3) for shape in shapes]
    for name, weights in (("distance", heads), ("equal_distance", equal)):
        pairs = [([x[i] for x in features], [y[i] for y in other]) for i in range(2)]
        out[name] = np.array([perceptual_distance(*pair, weights) for pair in pairs])
    return out


def ssim_golden(rng):
    """Two pairs of pictures of 13x15 with 3 channels; the second of a pair leaves [-1, 1]."""
    images = np.tanh(_normal(rng, 2, 13, 15, 3))
    reconstruction = images + _normal(rng, 2, 13, 15, 3) * np.array([0.2, 0.9], np.float32)[:, None, None, None]
    values = [structural_similarity(x, y) for x, y in zip(images, reconstruction, strict=True)]
    return {"images": images, "reconstruction": reconstruction, "ssim": np.array(values)}


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


GOLDENS = {
    "quantize": quantize_golden, "sampling": sampling_golden, "transformer": transformer_golden,
    "discriminator": discriminator_golden, "perceptual": perceptual_golden, "ssim": ssim_golden,
}  # fmt: skip


def make(name):
    """The arrays of one file."""
    return GOLDENS[name](np.random.default_rng(7))


if __name__ == "__main__":
    for name in GOLDENS:
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **make(name))
