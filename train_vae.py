"""Stage 1: train a tokenizer on images.

python train_vae.py --config=configs/rqvae.py:demo --workdir=runs/rqvae [--config.optim.learning_rate=1e-3 ...]
"""

import functools

from configs import dqvae, rqvae
from rq_jax import recipes
from rq_jax.training import cli

if __name__ == "__main__":
    presets = {"configs/rqvae.py": rqvae.PRESETS, "configs/dqvae.py": dqvae.PRESETS}
    cli.main(functools.partial(recipes.train, stage=1), presets)
