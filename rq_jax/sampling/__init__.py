"""Sampling from an RQ-Transformer: the filter, the loop over positions and depths, rejection sampling."""

from rq_jax.sampling.filter import check_filter, filter_logits
from rq_jax.sampling.generate import check_guidance, generate, rng_of_seed
from rq_jax.sampling.rerank import keep_best

__all__ = ["check_filter", "check_guidance", "filter_logits", "generate", "keep_best", "rng_of_seed"]
