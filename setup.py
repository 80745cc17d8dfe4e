"""Packaging. See pyproject.toml for the build system and the settings of ruff, mypy and pytest."""

from setuptools import find_packages, setup

# Upper bounds are the newest versions that all tests have passed with; .ci/bounds.py raises them. A first number of 0
# promises nothing from one second number to the next, and lm_eval not even from one third number to the next.
PLOT = ["matplotlib>=3.8,<4"]
WANDB = ["wandb>=0.31,<0.32"]
TENSORBOARD = ["tensorboard>=2.20,<3"]
SENTENCEPIECE = ["sentencepiece>=0.2,<0.3"]
PARQUET = ["pyarrow>=17,<27"]
IMAGES = ["pillow>=10.1,<14"]
TRANSFORMERS = ["transformers>=5.16,<5.25"]
# Exactly this one: what its engine relies on, and works around, is in DeepSpeed's internals. Installing it needs torch.
DEEPSPEED = ["deepspeed==0.19.8"]
ADAPTERS = ["peft>=0.21,<0.22", *TRANSFORMERS]
EVAL = ["lm_eval>=0.4.13,<0.4.14", *TRANSFORMERS, *PARQUET]
TRL = ["trl>=1.16,<2"]  # only to test that adapters work in it
DOCS = ["mkdocs>=1.6,<1.7", "mkdocs-material>=9.8,<9.9"]  # also for `make docs`, which builds without a network
# Comes with PyTorch's builds for GPUs; without one the kernels are tested in its interpreter.
TRITON = ["triton>=3.5,<4; platform_system == 'Linux'"]
TIKTOKEN = ["tiktoken>=0.11,<0.15"]  # before, it took special tokens that a text spells out for special tokens
# Beside the code in a source tree, inside the package when installed: see megatron_tf/shipped.py.
FOLDERS = {
    "megatron_tf.configs": "configs",
    "megatron_tf.slurm": "launch/slurm",
    "megatron_tf.experiments": "experiments",
}

setup(
    name="megatron_tf",
    version="0.1.0",
    description="Training of TokenFormer language models that grow, in three dimensions of parallelism",
    packages=[*find_packages(include=["megatron_tf", "megatron_tf.*"]), *FOLDERS],
    package_dir=FOLDERS,
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_data={
        "megatron_tf": ["py.typed"],
        "megatron_tf.configs": ["*.yml", "finetune/*.yml", "schema.json"],
        "megatron_tf.slurm": ["*.sbatch"],
        "megatron_tf.experiments": ["*.yml"],
        "megatron_tf.adapters": ["remote_code/*.py"],  # goes into every export of an adapter
        "megatron_tf.convert.huggingface": ["remote_code/*.py"],  # goes into every export, as it is
        "megatron_tf.model.kernels": ["*.c"],  # built on first use
    },
    entry_points={
        "console_scripts": ["megatron_tf = megatron_tf.entry:main"],
        "vllm.general_plugins": ["megatron_tf = megatron_tf.adapters.vllm_plugin:register"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26,<3",
        "pydantic>=2.11,<3",
        "PyYAML>=6,<7",
        "rich>=13,<16",
        "safetensors>=0.4.3,<0.9",
        "tokenizers>=0.20,<0.24",
        "xxhash>=3.4,<5",
        "zstandard>=0.22,<0.26",
    ],
    extras_require={
        "adapters": ADAPTERS,
        "deepspeed": DEEPSPEED,
        "docs": DOCS,
        "eval": EVAL,
        "hf": TRANSFORMERS,
        "images": IMAGES,
        "parquet": PARQUET,
        "plot": PLOT,
        "sentencepiece": SENTENCEPIECE,
        "tensorboard": TENSORBOARD,
        "tiktoken": TIKTOKEN,
        "wandb": WANDB,
        "dev": [
            "mypy>=1.15,<3",
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.15,<0.18",
            *ADAPTERS,
            *DEEPSPEED,
            *EVAL,
            *IMAGES,
            *PARQUET,
            *PLOT,
            *SENTENCEPIECE,
            *TENSORBOARD,
            *TIKTOKEN,
            *TRANSFORMERS,
            *TRITON,
            *TRL,
            *WANDB,
        ],
    },
)
