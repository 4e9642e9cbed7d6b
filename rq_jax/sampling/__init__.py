"""Sampling from a transformer: the filter, a loop for each kind of codes behind one `generate`, rejection sampling."""

from rq_jax.sampling.draws import rng_of_seed
from rq_jax.sampling.filter import check_filter, filter_logits
from rq_jax.sampling.generate import check_guidance, generate
from rq_jax.sampling.rerank import keep_best

__all__ = ["check_filter", "check_guidance", "filter_logits", "generate", "keep_best", "rng_of_seed"]
