"""Tables of results: the rows of each, and the settings that a row changes. Data only; `benchmarks.ablate` makes them.

A row of one of the first two dictionaries changes settings of the preset `demo` of its stage, after those that all rows
of it change; a row of the third changes options of sample.py on the pair that ships.
"""

# On the squared error alone; evaluate.py measures at the end.
TOKENIZER_CHANGES = {
    "loss.perceptual_weight": 0.0,
    "loss.adversarial_weight": 0.0,
    "evaluation.use_perceptual": False,
    "loop.total_steps": 600,
    "loop.evaluate_every_steps": 600,
}
TRANSFORMER_CHANGES = {"loop.total_steps": 700, "loop.evaluate_every_steps": 700}

BASE = "D 4, K 512"
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

# Over the codes of the base tokenizer of seed 0.
TRANSFORMERS = {
    "soft labels, stochastic codes": {},
    "soft labels": {"loss.use_stochastic_codes": False},
    "stochastic codes": {"loss.use_soft_labels": False},
    "neither": {"loss.use_soft_labels": False, "loss.use_stochastic_codes": False},
}

# The first option is the one the row varies; options left out are those of the pair's config.
FILTERS = {
    **{f"top-p {p}": {"top_p": p} for p in (0.3, 0.5, 0.7, 0.85, 0.95, 1.0)},
    **{f"top-k {k}": {"top_k": k, "top_p": 1.0} for k in (4, 16, 64, 256)},
    **{f"guidance {g}": {"guidance": g} for g in (1.0, 1.5, 2.0, 3.0, 4.0)},
}

TABLES = {
    "depth": ("D 1, K 512", "D 2, K 512", BASE, "D 8, K 512", "D 1, K 2048", "D 1, K 8192", "D 4, K 4 x 128"),
    "adversary": ("D 1, K 512", "D 1, K 512, adversary", BASE, "D 4, K 512, adversary"),
    "coarse_to_fine": (BASE, "D 8, K 512"),
    "updates": (BASE, "pooled updates", "no restart", "pooled updates, no restart"),
    "soft_labels": tuple(TRANSFORMERS),
    "filter": tuple(FILTERS),
}
