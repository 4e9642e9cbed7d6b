"""How well samples fit the texts that they were drawn with, by CLIP."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rq_jax.evaluation import statistics
from rq_jax.evaluation.features import FeatureExtractor
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.preparation import PROTOCOLS
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_comparison import cache_of
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.set_figures import Estimators
from rq_jax.pretrained import clip, clip_text
from rq_jax.pretrained.files import UNVERIFIED

_TEXTS = 64  # of one program


class PromptScores:
    """Mean cosine of the features of images and texts; everything is checked when it is made."""

    def __init__(self, args: Any, mesh: jax.sharding.Mesh, data: EvaluationData, samples: Sequence[ImageSet]):
        """As follows.

        Args:
          args: the flags of a command.
          mesh: of the devices that share a batch.
          data: gives the batch size.
          samples: of which some have prompts.

        Raises:
          ValueError: no samples with prompts, or a text of more than 77 tokens that is not to be cut.
          FileNotFoundError: no file, or the packages of CLIP's vocabulary are not installed.
        """
        with_prompts = [one for one in samples if one.prompts is not None]
        if not with_prompts:
            raise ValueError(f"--clip: '{args.clip}' needs samples with prompts, and none has any; leave it out")
        tokenizer = clip_text.load_tokenizer(args.cut_captions)
        self._tokens = {one.name: tokenizer(list(one.prompts or ())) for one in with_prompts}
        self._net = clip.load(args.clip)
        self._text_features = make_text_features(self._net)
        extractor = FeatureExtractor(self._net, mesh, PROTOCOLS["house"])
        self._features = SetFeatures(extractor, data, Estimators(), cache_of(args), has_logits=False)

    def add(self, samples: ImageSet, report: Report) -> None:
        """Adds the score of a set with prompts to a report."""
        found = self._features.of_images("features of samples by CLIP", samples, samples.is_rounded)
        texts = self._text_features(self._tokens[samples.name][found.positions])
        name = "clip_similarity" if self._net.weights == UNVERIFIED else "CLIP_score"
        protocol = {
            **self._features.extractor.fields(samples.is_rounded), "images": len(found.positions),
            "conditions": samples.conditions_digest(), "estimator": "mean cosine, without a factor",
        }  # fmt: skip
        score = statistics.clip_score(found.vectors[0], texts)
        report.add(name, f"samples {samples.name}", score, {"features": self._net.name}, protocol)


def make_text_features(net: clip.CLIP) -> Callable[[np.ndarray], np.ndarray]:
    """The function from tokens (n, 77) of texts to their features (n, A) by CLIP, some texts at a time."""
    program, variables = jax.jit(net.text_features), {"text": net.variables["text"]}

    def text_features(tokens: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(tokens), _TEXTS):
            rows = np.minimum(np.arange(start, start + _TEXTS), len(tokens) - 1)  # one shape for all
            parts.append(np.asarray(program(variables, tokens[rows]))[: len(tokens) - start])
        return np.concatenate(parts)

    return text_features
