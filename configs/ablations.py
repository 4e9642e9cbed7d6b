"""Tables of results: the rows of each, and the settings that a row changes. Data only; `benchmarks.ablate` makes them.

A row that is trained changes settings of a preset `demo`, after those that all rows of its group change; a row of
`DRAWN` changes options of sample.py on the pair that ships.
"""

# On the squared error alone; evaluate.py measures at the end.
TOKENIZER_CHANGES = {
    "loss.perceptual_weight": 0.0,
    "loss.adversarial_weight": 0.0,
    "evaluation.use_perceptual": False,
    "loop.total_steps": 600,
    "loop.evaluate_every_steps": 600,
}
BASE = "D 4, K 512"
# "tokenizer" names a row, whose first seed all transformers share.
TRANSFORMER_CHANGES = {"tokenizer": BASE, "loop.total_steps": 700, "loop.evaluate_every_steps": 700}
# The last quarter of the run, as in the demo.
ADVERSARY = {
    "loss.perceptual_weight": 0.02,
    "loss.perceptual_start_steps": 450,
    "loss.adversarial_weight": 0.2,
    "loss.adversarial_start_steps": 450,
}

TOKENIZERS = {
    BASE: {},
    "D 1, K 512": {"model.code_shape": (8, 8, 1)},
    "D 2, K 512": {"model.code_shape": (8, 8, 2)},
    "D 8, K 512": {"model.code_shape": (8, 8, 8)},
    "D 1, K 2048": {"model.code_shape": (8, 8, 1), "model.codebook_size": 2048},
    "D 1, K 8192": {"model.code_shape": (8, 8, 1), "model.codebook_size": 8192},
    "D 4, K 4 x 128": {"model.codebook_size": 128, "model.use_shared_codebook": False},
    "D 1, K 512, adversary": {"model.code_shape": (8, 8, 1), **ADVERSARY},
    "D 4, K 512, adversary": ADVERSARY,
    "pooled updates": {"model.codebook_update": "pooled"},
    "no restart": {"model.use_restart": False},
    "pooled updates, no restart": {"model.codebook_update": "pooled", "model.use_restart": False},
}

# Every image as many codes, at the sizes and with the losses of the tokenizers with grains below.
_FIXED_4X4 = {"model.width_multipliers": (1, 2, 2, 2), "loss.reconstruction": "mse"}
FIXED_LENGTHS = {
    "fixed, 4x4": {**_FIXED_4X4, "model.code_shape": (4, 4, 1)},
    "fixed, 4x4x2": {**_FIXED_4X4, "model.code_shape": (4, 4, 2)},
    "fixed, 4x4x3": {**_FIXED_4X4, "model.code_shape": (4, 4, 3)},
    "fixed, 8x8": {"model.code_shape": (8, 8, 1), "loss.reconstruction": "mse"},
}
# 16 codes where all regions are coarse, 64 where all are fine.
_RATIOS = {f"{ratio:.1f} fine": ratio for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)}
_MEANS = {"32 codes": 1 / 3, "48 codes": 2 / 3}
GRAINS_CHANGES = {**TOKENIZER_CHANGES, "loss.reconstruction": "mse"}
WITH_GRAINS = {
    **{f"entropy, {name}": {"model.fine_ratio": ratio} for name, ratio in (_MEANS | _RATIOS).items()},
    **{
        f"{router}, {name}": {"model.router": router, "model.fine_ratio": ratio, "loss.budget_weight": budget_weight}
        for router, budget_weight in (("feature", 20.0), ("random", 0.0))
        for name, ratio in _MEANS.items()
    },
    # Under a weight near what a fine region gains in squared error; the original's 20 stand beside other losses.
    **{
        f"feature, {name}, budget 0.3": {
            "model.router": "feature",
            "model.fine_ratio": ratio,
            "loss.budget_weight": 0.3,
        }
        for name, ratio in _MEANS.items()
    },
    # 24 positions of two codes each.
    "D 2, 48 codes": {"model.code_depth": 2, "model.fine_ratio": 1 / 6},
}

TRANSFORMERS = {
    "soft labels, stochastic codes": {},
    "soft labels": {"loss.use_stochastic_codes": False},
    "stochastic codes": {"loss.use_soft_labels": False},
    "neither": {"loss.use_soft_labels": False, "loss.use_stochastic_codes": False},
    "Muon": {"optim.name": "muon"},
}

_BASE_RATIO = "0.5 fine"
GRAIN_TRANSFORMER_CHANGES = {**TRANSFORMER_CHANGES, "tokenizer": f"entropy, {_BASE_RATIO}"}
GRAIN_TRANSFORMERS = {
    "as the paper": {},
    "no grain embedding": {"model.use_grain_embedding": False},
    "one table of positions": {"model.use_shared_position_embedding": True},
    "no grain embedding, one table": {"model.use_grain_embedding": False, "model.use_shared_position_embedding": True},
    "fine cells by region": {"model.order": "region"},
    **{f"{p} + {6 - p} blocks": {"model.position_layers": p, "model.content_layers": 6 - p} for p in (1, 3)},
    **{f"over {name}": {"tokenizer": f"entropy, {name}"} for name in _RATIOS if name != _BASE_RATIO},
}

# The first option is the one the row varies; options left out are those of the pair's config.
FILTERS = {
    **{f"top-p {p}": {"top_p": p} for p in (0.3, 0.5, 0.7, 0.85, 0.95, 1.0)},
    **{f"top-k {k}": {"top_k": k, "top_p": 1.0} for k in (4, 16, 64, 256)},
    **{f"guidance {g}": {"guidance": g} for g in (1.0, 1.5, 2.0, 3.0, 4.0)},
}

# The share that a classifier keeps, of so many more samples.
REJECTION = {f"{100 * keep:g} % kept": {"keep": keep, "by": "classifier"} for keep in (1.0, 0.5, 0.25, 0.125, 0.05)}
DRAWN = FILTERS | REJECTION

# Config, what all rows of a group change, and what each does.
TRAINED = (
    ("rqvae", TOKENIZER_CHANGES, TOKENIZERS | FIXED_LENGTHS),
    ("dqvae", GRAINS_CHANGES, WITH_GRAINS),
    ("rqtransformer", TRANSFORMER_CHANGES, TRANSFORMERS),
    ("dqtransformer", GRAIN_TRANSFORMER_CHANGES, GRAIN_TRANSFORMERS),
)
ROWS = {name: changes for *_, rows in TRAINED for name, changes in rows.items()} | DRAWN

TABLES = {
    "depth": ("D 1, K 512", "D 2, K 512", BASE, "D 8, K 512", "D 1, K 2048", "D 1, K 8192", "D 4, K 4 x 128"),
    "adversary": ("D 1, K 512", "D 1, K 512, adversary", BASE, "D 4, K 512, adversary"),
    "coarse_to_fine": (BASE, "D 8, K 512"),
    "updates": (BASE, "pooled updates", "no restart", "pooled updates, no restart"),
    "soft_labels": ("soft labels, stochastic codes", "soft labels", "stochastic codes", "neither"),
    "optimizer": ("soft labels, stochastic codes", "Muon"),  # AdamW, Muon
    "filter": tuple(FILTERS),
    "rejection": tuple(REJECTION),
    "dq_rate": (
        *FIXED_LENGTHS,
        *(f"{router}, {name}" for router in ("entropy", "feature", "random") for name in _MEANS),
    ),
    "dq_router": tuple(f"feature, {name}, budget 0.3" for name in _MEANS),
    "dq_ratio": tuple("as the paper" if name == _BASE_RATIO else f"over {name}" for name in _RATIOS),
    "dq_layers": (
        "as the paper",
        "no grain embedding",
        "one table of positions",
        "no grain embedding, one table",
        "fine cells by region",
    ),
    "dq_split": ("1 + 5 blocks", "as the paper", "3 + 3 blocks"),
    "dq_depth": ("entropy, 48 codes", "D 2, 48 codes"),
}
