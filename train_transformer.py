"""Stage 2: train a transformer over the codes of a tokenizer.

python train_transformer.py --config=configs/rqtransformer.py:demo --workdir=runs/rqt --config.tokenizer=runs/rqvae
"""

import functools

from configs import rqtransformer
from rq_jax import recipes
from rq_jax.training import cli

if __name__ == "__main__":
    cli.main(functools.partial(recipes.train, stage=2), {"configs/rqtransformer.py": rqtransformer.PRESETS})
