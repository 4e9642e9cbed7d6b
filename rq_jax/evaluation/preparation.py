"""How images are prepared for a feature network, under named protocols of the literature."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rq_jax.devices import sharding
from rq_jax.pretrained import clip, efficientnet_lite, inception, resnet
from rq_jax.pretrained.preprocess import resize

RANGE = "[-1, 1]"
ROUNDED, UNROUNDED = "to 8 bits", "none"
# The side to which a network resizes images, and how it does so.
OWN_RESIZE = {
    "clip_vit_b32": (clip.VIT_B32.image_side, "bicubic in 8 bits, antialiased, central crop"),
    "efficientnet_lite0": (efficientnet_lite.SIZE, "bicubic, antialiased"),
    "inception_2015": (inception.SIZE, "bilinear, not antialiased"),
    "resnet101": (resnet.SIZE, "bilinear, antialiased, 256 to the short side, central crop"),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Choices that a figure of sets of images rests on.

    Attributes:
      name: on the command line.
      source: where the choices are from.
      reference: split that samples are compared with, unless another is named.
      rounds_samples, rounds_reconstructions: images are rounded to 8 bits before the network; of files they always are.
      resizes: images get the size of the network by an antialiased cubic kernel, as Pillow's, before its own resize.
      score_split: images of a split of the inception score, in order; None: ten splits of shuffled images.
    """

    name: str
    source: str
    reference: str = "train"
    rounds_samples: bool = True
    rounds_reconstructions: bool = True
    resizes: bool = False
    score_split: int | None = None

    def prepare(self, images: jax.Array, network: str, rounds: bool) -> jax.Array:
        """Images (B, H, W, C) in [-1, 1], nominally, as the network gets them, float32 in [-1, 1].

        Args:
          network: name of the network.
          rounds: to 8 bits.
        """
        images = jnp.clip(images.astype(jnp.float32), -1, 1)
        if rounds:  # as images of bytes are scaled, bit for bit
            images = sharding.scale(jnp.round((images + 1) * 127.5).astype(jnp.uint8))
        if self.resizes and network in OWN_RESIZE:
            side, _ = OWN_RESIZE[network]
            images = resize(images, side, side, "bicubic")
        return images

    def fields(self, net: Any, rounds: bool) -> dict[str, Any]:
        """The fields of preparation and network in the protocol of a figure.

        Args:
          net: a `pretrained.classifier.Classifier`, or its like.
          rounds: as in `prepare`; also images that are bytes from the start.
        """
        side, own = OWN_RESIZE.get(net.name, (None, "none"))
        before = f"bicubic, antialiased, to {side}x{side}" if self.resizes and side else "none"
        return {
            "range": RANGE, "clipping": f"to {RANGE}", "rounding": ROUNDED if rounds else UNROUNDED,
            "grey": "three equal channels", "resize before the extractor": before, "extractor": net.name,
            "extractor weights": getattr(net, "sha256", "")[:16],
            "extractor resize": f"{own}, to {side}x{side}" if side else own,
        }  # fmt: skip


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "house",
            "samples as their files hold them, reconstructions as they come, against the held-out images",
            reference="validation",
            rounds_reconstructions=False,
        ),
        Protocol(
            "rq",
            "Lee et al., CVPR 2022; kakaobrain/rq-vae-transformer: rqvae/metrics/fid.py, compute_metrics.py",
            rounds_samples=False,
            rounds_reconstructions=False,
        ),
        Protocol(
            "adm",
            "Dhariwal and Nichol, NeurIPS 2021, section 2.2; openai/guided-diffusion: evaluations/evaluator.py",
            score_split=5000,
        ),
        Protocol("clean", "Parmar, Zhang and Zhu, CVPR 2022; GaParmar/clean-fid: cleanfid/resize.py", resizes=True),
    )
}
