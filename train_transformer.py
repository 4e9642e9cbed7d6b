"""Stage 2: train a transformer over the codes of a tokenizer.

python train_transformer.py --config=configs/rqtransformer.py:demo --workdir=runs/rqt --config.tokenizer=runs/rqvae
python train_transformer.py --config=configs/dqtransformer.py:demo --workdir=runs/dqt --config.tokenizer=runs/dqvae
"""

import functools

from configs import dqtransformer, rqtransformer
from rq_jax import recipes
from rq_jax.training import cli

if __name__ == "__main__":
    presets = {"configs/rqtransformer.py": rqtransformer.PRESETS, "configs/dqtransformer.py": dqtransformer.PRESETS}
    cli.main(functools.partial(recipes.train, stage=2), presets)
