"""Package metadata, dependency ranges and extras. The ranges are those the tests have run on (docs/log.md)."""

from setuptools import find_packages, setup

DATA = ["pyarrow>=17", "zstandard>=0.22", "fsspec>=2024.6"]
HF = ["tokenizers>=0.20", "safetensors>=0.4.5"]
DEV = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.12", "tensorboard>=2.18"]

setup(
    name="llada_jax",
    version="0.1.0",
    description="Pretraining of LLaDA, the masked diffusion language model, in JAX",
    python_requires=">=3.11",
    packages=find_packages(include=["llada_jax", "llada_jax.*"]),
    package_data={"llada_jax": ["data/*.xz", "data/*.md"]},
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "array-record>=0.8,<0.9",
        "etils[epath]>=1.9",
        "numpy>=2.0",
        "sentencepiece>=0.2.0,<0.3",
        "ml-collections>=1.0,<2",
        "tensorboardX>=2.6,<3",
        "rich>=13",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "data": DATA,
        "hf": HF,
        "eval": HF,
        "docs": ["tensorboard>=2.18"],
        "dev": [*DATA, *HF, *DEV],
    },
    entry_points={"console_scripts": ["llada-jax = llada_jax.__main__:main"]},
)
