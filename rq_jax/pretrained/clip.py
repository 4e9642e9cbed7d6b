"""CLIP ViT-B/32 (Radford et al., ICML 2021): features of images and of texts in one space."""

import logging
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.pretrained.files import UNVERIFIED, WeightFile, open_weights
from rq_jax.pretrained.preprocess import as_rgb, normalise, resize_as_bytes
from rq_jax.settings import checks

_HEAD_WIDTH = 64
_EPSILON = 1e-5  # of the layer normalisations
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CONTENT = "CLIP ViT-B/32 as OpenAI publishes it, such as ViT-B-32.pt"
PUBLISHED = {"40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B-32.pt"}

logger = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """Sizes of the two towers; the defaults are those of ViT-B/32."""

    num_features: int = 512
    image_side: int = 224
    patch_side: int = 32
    image_width: int = 768
    image_layers: int = 12
    vocab_size: int = 49408
    text_length: int = 77
    text_width: int = 512
    text_layers: int = 12


VIT_B32 = Sizes()


class _Block(nn.Module):
    """Self-attention and MLP with a layer normalisation in front of each."""

    is_causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, T, M = x.shape
        heads_BTNA = (B, T, M // _HEAD_WIDTH, _HEAD_WIDTH)
        qkv = nn.Dense(3 * M, name="attn.in_proj")(_norm("ln_1")(x))
        q, k, v = (part.reshape(heads_BTNA) for part in jnp.split(qkv, 3, axis=-1))
        scores_BNTS = jnp.einsum("BTNA,BSNA->BNTS", q, k) * _HEAD_WIDTH**-0.5
        if self.is_causal:
            scores_BNTS = jnp.where(np.tri(T, dtype=bool)[None, None], scores_BNTS, -jnp.inf)
        y = jnp.einsum("BNTS,BSNA->BTNA", nn.softmax(scores_BNTS), v).reshape(B, T, M)
        x = x + nn.Dense(M, name="attn.out_proj")(y)
        y = nn.Dense(4 * M, name="mlp.c_fc")(_norm("ln_2")(x))
        return x + nn.Dense(M, name="mlp.c_proj")(y * nn.sigmoid(1.702 * y))  # GELU as of its first authors


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


def _parameter(module: nn.Module, name: str, *shape: int) -> jax.Array:
    return module.param(name, nn.initializers.normal(0.02), shape, jnp.float32)


class ImageTower(nn.Module):
    """Preprocessed images (B, 224, 224, 3) to features (B, 512)."""

    sizes: Sizes

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        s, M, B = self.sizes, self.sizes.image_width, len(images)
        patch = (s.patch_side, s.patch_side)
        x = nn.Conv(M, patch, patch, "VALID", use_bias=False, name="conv1")(images).reshape(B, -1, M)
        first = jnp.broadcast_to(_parameter(self, "class_embedding", M), (B, 1, M))
        x = jnp.concatenate([first, x], axis=1)
        x = _norm("ln_pre")(x + _parameter(self, "positional_embedding", *x.shape[1:])[None])
        for i in range(s.image_layers):
            x = _Block(is_causal=False, name=f"transformer.resblocks.{i}")(x)
        return _norm("ln_post")(x[:, 0]) @ _parameter(self, "proj", M, s.num_features)


class TextTower(nn.Module):
    """Token ids (B, 77) to features (B, 512): those at the end of the text, whose id is the largest."""

    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        s, M = self.sizes, self.sizes.text_width
        x = _parameter(self, "token_embedding", s.vocab_size, M)[tokens]
        x = x + _parameter(self, "positional_embedding", s.text_length, M)[None]
        for i in range(s.text_layers):
            x = _Block(is_causal=True, name=f"transformer.resblocks.{i}")(x)
        ends = jnp.argmax(tokens, axis=-1)[:, None, None]
        x = jnp.take_along_axis(_norm("ln_final")(x), ends, axis=1)[:, 0]
        return x @ _parameter(self, "text_projection", M, s.num_features)


class CLIP(NamedTuple):
    """The two towers and their weights.

    Attributes:
      name: "clip_vit_b32", which belongs to every figure of it.
      variables: {"image": of `ImageTower`, "text": of `TextTower`, "logit_scale": ()}, 605 MB.
      sizes: of the towers.
      sha256: of the weight file.
      weights: name of the published file with that digest, or "unverified".
    """

    name: str
    variables: dict[str, Any]
    sizes: Sizes = VIT_B32
    sha256: str = ""
    weights: str = UNVERIFIED

    @property
    def num_features(self) -> int:
        return self.sizes.num_features

    def features(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Features of images, as CLIP sees them: the middle 224x224 after a bicubic resize in 8 bits.

        Differs from rqvae/metrics/clip_score.py, which cuts values to 8 bits where they are rounded here.

        Args:
          variables: those of this object, or a copy on the devices.
          images: (B, H, W, C), clipped to [-1, 1], C 1 or 3; a grey image counts as three equal channels.

        Returns:
          (B, 512), float32, not of length 1.

        Raises:
          ValueError: another shape.
        """
        x = normalise(resize_as_bytes(as_rgb(images), self.sizes.image_side), _MEAN, _STD)
        with jax.default_matmul_precision("highest"):
            return ImageTower(self.sizes).apply({"params": variables["image"]}, x)

    def text_features(self, variables: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Features of texts.

        Args:
          variables: those of this object, or a copy on the devices.
          tokens: (B, 77), int32, from `clip_text.Tokenizer`.

        Returns:
          (B, 512), float32, not of length 1.

        Raises:
          ValueError: another shape.
        """
        checks.shape("tokens", tokens.shape, ("B", self.sizes.text_length))
        with jax.default_matmul_precision("highest"):
            return TextTower(self.sizes).apply({"params": variables["text"]}, tokens)

    def logits(self, variables: dict[str, Any], features: jax.Array, text_features: jax.Array) -> jax.Array:
        """Logits (B, P) of P texts for B images: cosines times the trained scale, about 100."""
        features, text_features = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (features, text_features))
        cosines = jnp.dot(features, text_features.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.exp(variables["logit_scale"]) * cosines


def abstract_variables(sizes: Sizes = VIT_B32) -> dict[str, Any]:
    """Shapes and dtypes of `CLIP.variables`, read from no file."""
    image = jax.ShapeDtypeStruct((1, sizes.image_side, sizes.image_side, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, sizes.text_length), jnp.int32)
    towers = {"image": (ImageTower(sizes), image), "text": (TextTower(sizes), tokens)}
    init = {name: jax.eval_shape(tower.init, jax.random.key(0), x)["params"] for name, (tower, x) in towers.items()}
    return {**init, "logit_scale": jax.ShapeDtypeStruct((), jnp.float32)}


def load(path: str | os.PathLike[str], sizes: Sizes = VIT_B32) -> CLIP:
    """Load the weights.

    Args:
      path: OpenAI's file, which is a TorchScript program in half precision, or a state dict with the same names. A
        file with another digest is taken and called unverified.
      sizes: of the network in the file.

    Returns:
      The network, with its weights as NumPy arrays in float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, or of another network.
    """
    file = open_weights(path, _CONTENT, PUBLISHED)
    shapes = abstract_variables(sizes)
    variables = {
        "image": _read(file, shapes["image"], "visual."),
        "text": _read(file, shapes["text"], ""),
        "logit_scale": file.array("logit_scale"),
    }
    logger.info("features: clip_vit_b32 ('%s', %s)", path, file.published)
    return CLIP("clip_vit_b32", variables, sizes, file.sha256, file.published)


def _read(file: WeightFile, shapes: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The parameters of a module, whose names are those of the file but for kernels and scales."""
    params = {}
    for name, inner in shapes.items():
        key, shape = f"{prefix}{name}", getattr(inner, "shape", ())
        if not isinstance(inner, dict):
            # The projections and embeddings are stored as they are used.
            params[name] = file.array(f"{key}.weight" if name == "token_embedding" else key, *shape)
        elif "kernel" in inner:
            params[name] = _read_layer(file, key, inner)
        elif "scale" in inner:
            parts = {"scale": "weight", "bias": "bias"}
            params[name] = {part: file.array(f"{key}.{stored}", *inner[part].shape) for part, stored in parts.items()}
        else:
            params[name] = _read(file, inner, f"{key}.")
    return params


def _read_layer(file: WeightFile, key: str, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    kernel = shapes["kernel"].shape
    if len(kernel) == 4:
        rows, columns, inputs, outputs = kernel
        array = file.array(f"{key}.weight", outputs, inputs, rows, columns).transpose(2, 3, 1, 0)
        return {"kernel": np.ascontiguousarray(array)}
    # The three products of attention have no module of their own in the file, hence the underscores.
    return file.linear(key, *kernel, separator="_" if key.endswith("in_proj") else ".")
