"""Stage 2: a DQ-Transformer over the packed codes of a frozen tokenizer with grains (DQ paper, section 3.3)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import grains, losses, sampling
from rq_jax.data import Splits
from rq_jax.devices import sharding
from rq_jax.evaluation.likelihood import describe_streams, hidden_nats
from rq_jax.recipes.buckets import BucketedDataset, Programs
from rq_jax.recipes.stage2 import CondLosses, Stage2
from rq_jax.report import grain_maps, grids
from rq_jax.settings import checks
from rq_jax.settings.construct import construct
from rq_jax.training.state import TrainState

_POSITION = "position_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses(CondLosses):
    """The losses of packed codes: the config section `loss`.

    Attributes (besides those of `CondLosses`):
      content_weight: of the mean over contents, at code depths above 1 the plain average of those of the depths.
      position_weight: of the plain average over grains of the means over their positions.
    """

    content_weight: float = 1.0
    position_weight: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class DQTransformer(Stage2):
    """Recipe of DQ-Transformers; attributes as `Stage2`.

    Images have unlike numbers of tokens: every mean is over those of the whole batch, however it is split.
    """

    losses: Losses = Losses()

    losses_class: ClassVar[type] = Losses
    has_grains: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, tuple[str, int]]] = {"content_loss": ("depth", 1), "position_loss": ("grain", 0)}

    def __post_init__(self):
        super().__post_init__()
        self.buckets.check_layout(self.model.layout)
        longest = self.model.layout.max_tokens
        checks.at_least("model.num_slots", self.model.slots, longest, fix="the longest image has so many tokens")

    @classmethod
    def check_sample(cls, sample: Mapping[str, Any]) -> None:
        """The config section `sample`, of contents and of positions; see `Stage2.check_sample`."""
        of_position = {name: value for name, value in sample.items() if name.startswith(_POSITION)}
        super().check_sample({name: value for name, value in sample.items() if name not in of_position})

        def check(position_temperature=None, position_top_k=None, position_top_p=None):
            sampling.check_filter(position_temperature, position_top_k, position_top_p, prefix=f"sample.{_POSITION}")

        construct(check, "sample", of_position)

    # --- length buckets ---

    def start(self, workdir: str, data: Splits, is_fresh: bool) -> tuple["DQTransformer", Any]:
        """As `Stage2.start`; with buckets the training data are packed codes, grouped by length."""
        recipe, data = super().start(workdir, data, is_fresh)
        return recipe, data._replace(train=recipe.bucketed(data.train)) if self.buckets.tokens else data

    def bucketed(self, dataset: Any) -> BucketedDataset:
        """Batches of packed codes, see `BucketedDataset`, from those of a dataset of images, or of a cache."""
        layout, replicated = self.model.layout, sharding.replicated(self.mesh)

        # Rows move from any batch to any other: codes are small, so that every device holds those of a window.
        @functools.partial(jax.jit, out_shardings=replicated)
        def encode(frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
            with sharding.activations(self.mesh):
                codes = self._codes(batch, frozen)
            lengths_B = grains.num_codes(codes.grains, layout.num_grains) + 2 * layout.num_grains
            return {"codes": codes, **{name: batch[name] for name in ("cond", "index") if name in batch}}, lengths_B

        @functools.partial(jax.jit, static_argnums=2, out_shardings=(sharding.batch_sharding(self.mesh), replicated))
        def pack(window: Any, chosen_B: jax.Array, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
            rows = jax.tree.map(lambda *batches: jnp.concatenate(batches)[chosen_B], *window)
            whole = {name: rows.pop(name) for name in ("index",) if name in rows}  # which the host may ask for
            return {"packed": grains.pack(rows.pop("codes"), layout, tokens), **rows}, whole

        def encode_part(batch: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], jax.Array]:
            return encode(self.frozen, sharding.put_batch(self.mesh, batch))

        def pack_rows(window: Any, chosen_B: np.ndarray, tokens: int) -> dict[str, Any]:
            split, whole = pack(window, chosen_B, tokens)
            return split | whole

        return BucketedDataset(dataset, self.buckets, Programs(encode_part, pack_rows, layout.max_tokens), self.seed)

    # --- one update ---

    def _prepare(self, batch, rngs, model_state, frozen):
        """Tokens of all images, before any is split off: what the means are over has to be known."""
        packed = batch.get("packed")
        if packed is None:
            packed = grains.pack(self._codes(batch, frozen), self.model.layout)
        packed = sharding.split_batch(self.mesh, packed)
        cond, dropped = self.losses.drop(rngs["cond"], batch.get("cond"), self.model)
        rows = {"packed": packed, "cond": cond, "target_cond": batch.get("cond"), "dropped": dropped}
        counts = [jnp.sum(x, axis=0) for x in losses.stream_counts(packed, self.model.layout)]
        captions = (
            float(len(packed.length)) if dropped is None else jnp.maximum(jnp.sum(~dropped, dtype=jnp.float32), 1)
        )
        return rows, functools.partial(self._loss_and_grads, model_state=model_state, counts=(*counts, captions))

    def _codes(self, batch: Mapping[str, jax.Array], frozen: Any) -> grains.GrainedCodes:
        """Codes and grains of a batch of images, or of a cache."""
        if "codes" in batch:
            return grains.GrainedCodes(batch["codes"], batch["grains"])
        images = sharding.split_batch(self.mesh, batch["image"], sharding.AXES)
        encode = functools.partial(self.tokenizer.model.apply, frozen, method="encode_to_codes")
        return sharding.map_micro_batches(encode, images, self.optimizer.accumulation_steps)

    def _loss_and_grads(self, params, rows, rngs, model_state, counts):
        position_counts_G, content_counts_D, captions = counts
        # The update takes means over micro-batches and parts, of which each adds its share of the whole.
        shares = self.optimizer.accumulation_steps * sharding.num_parts(self.mesh, self._part_axes)
        share_weights = functools.partial(sharding.with_copies, self.mesh, inside=self._part_axes)

        def nats(params: Any, part: Any) -> losses.StreamNats:
            return hidden_nats(
                self.model, {"params": params, **model_state}, **part, num_devices=self._devices_of_an_image
            )

        def objective(params: Any, rows: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
            hidden = self.model.apply(
                {"params": params, **model_state}, rows["packed"], rows["cond"], train=True, method="hidden",
                rngs={"dropout": rngs["dropout"]},
            )  # fmt: skip
            part = {"hidden": hidden.position, "deep_hidden": hidden.content, "tokens": hidden.tokens}
            sums = share_weights(nats, params, part)
            position_G = shares * sums.position.sum(0) / position_counts_G
            content_D = shares * sums.content.sum(0) / content_counts_D
            packed = rows["packed"]
            terms = {"position_loss": position_G, "content_loss": content_D}
            terms["pad_share"] = 1 - jnp.mean(packed.length) / packed.position.shape[1]
            total = self.losses.position_weight * position_G.mean() + self.losses.content_weight * content_D.mean()
            if self.losses.text_weight:
                nats_BU = self.losses.text_nats(rows["target_cond"], hidden.cond_logits, rows["dropped"])
                terms["text_loss"] = shares * nats_BU.mean(1).sum() / captions
                total += self.losses.text_weight * terms["text_loss"]
            return total, terms

        return self._differentiate(objective, params, rows)

    # --- evaluation ---

    def report(self, state: TrainState, sums: Any, shown: None) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Nats of the nearest codes and of their positions, bits per image, and samples beside their grain maps."""
        held_out, marks = describe_streams(sums), self.figures
        scalars = {"validation_loss": held_out["mean"] + float(np.mean(held_out["position_nats"]))}
        scalars["bits_per_image"] = held_out["bits_per_image"]
        scalars |= _named(
            "validation_nats", held_out["nats"], held_out["position_nats"], held_out["mean_position_nats"]
        )
        if marks is not None:
            scalars |= _named("unigram_nats", marks.unigram_nats_D, marks.position_nats_G, marks.mean_position_nats)
        (_, maps), images = self._generate(state)
        G, D, maps = self.model.num_grains, self.model.code_shape[-1], np.asarray(maps)
        scale = max(1, 64 // images.shape[1])
        cells, captions = grain_maps.pairs(images, self._captions(len(images)), maps, G, scale, D)
        return scalars, {"samples": grids.captioned_grid(cells, captions, columns=12)}

    def _captions(self, count: int) -> list[str]:
        """Of the shown images: their classes by name, or their numbers."""
        names = self.config.get("class_names")
        if not names or self.model.is_text or not self.model.is_conditional:
            return [str(i) for i in range(count)]
        return [names[y] for y in self.shown_cond[:, 0]]


def _named(name: str, nats_D: Any, position_nats_G: Any, mean_position_nats: Any) -> dict[str, float]:
    """Nats as they are logged, of contents by depth and of positions over all and by grain."""
    named = {f"{name}/depth{d}": float(value) for d, value in enumerate(nats_D, start=1)}
    named[f"{name}/position"] = float(mean_position_nats)
    return named | {f"{name}/grain{g}": float(value) for g, value in enumerate(position_nats_G)}
