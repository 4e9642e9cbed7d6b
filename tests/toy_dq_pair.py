"""A small DQ-VAE and DQ-Transformer in model directories, beside the images that they name."""

import helpers
import jax

from rq_jax import checkpoint, models

TOKENIZER = dict(
    name="dqvae", image_size=16, code_dim=6, codebook_size=11, width=8, width_multipliers=(1, 1, 1), z_channels=8,
    num_res_blocks=1, norm_groups=4, attention_resolutions=(), router="entropy", thresholds=(1.0,),
)  # fmt: skip
TRANSFORMER = dict(
    name="dqtransformer", codebook_size=11, code_shape=(8, 8, 1), code_dim=6, num_grains=2, model_dim=8, num_heads=2,
    position_layers=1, content_layers=1, cond_vocab_size=3,
)  # fmt: skip


def save(directory, folder, settings) -> None:
    """Random weights of a model, as a directory that names the images of a folder."""
    data = {"name": "folder", "data_dir": str(folder), "image_size": 16}
    data |= {"channels": 3, "eval_transform": "resize_center_crop"}
    variables = jax.tree.map(lambda x: 4 * x, helpers.drawn_variables(models.create(**settings)))
    checkpoint.save_model(directory, {"model": settings, "data": data}, variables)


def save_pair(root) -> None:
    """Images, `tokenizer` and `transformer`, which belong together, under a directory."""
    folder = helpers.write_pictures(root / "pictures")
    for name, settings in (("tokenizer", TOKENIZER), ("transformer", TRANSFORMER)):
        save(root / name, folder, settings)
    checkpoint.bind_tokenizer(root / "transformer", checkpoint.load_tokenizer(root / "tokenizer"))
