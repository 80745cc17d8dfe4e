"""Finds what is installed here, what is missing, and what that would enable. Needs the standard library only."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from megatron_tf.requirements import is_wanted, wanted_versions
from megatron_tf.telemetry.text import count_of


@dataclass(frozen=True)
class Package:
    """A package and its purpose. `essential`: nothing works without it. `install`: the command that installs it."""

    name: str
    enables: str
    essential: bool = True
    install: str = "pip install -e ."

    @property
    def wanted(self) -> str:
        """The versions that this project was tested with, as pip writes them; "" for any."""
        return wanted_versions(self.name)


PACKAGES = (
    Package("torch", "everything"),
    Package("numpy", "everything"),
    Package("pydantic", "everything"),
    Package("PyYAML", "everything"),
    Package("safetensors", "checkpoints"),
    Package("xxhash", "checkpoints"),
    Package("rich", "the console"),
    Package("tokenizers", "data preparation and text"),
    Package("zstandard", "data preparation from .zst files"),
    Package(
        "deepspeed", "training", False,
        "pip install setuptools wheel ninja && "
        f"pip install --no-build-isolation deepspeed{wanted_versions('deepspeed')}",
    ),
    Package("matplotlib", "tools/plot_run.py", False, "pip install -e '.[plot]'"),
    Package("pillow", "models of images", False, "pip install -e '.[images]'"),
    Package("pyarrow", "data preparation from .parquet files", False, "pip install -e '.[parquet]'"),
    Package("sentencepiece", "SentencePiece tokenizers", False, "pip install -e '.[sentencepiece]'"),
    Package("tensorboard", "the tensorboard tracker", False, "pip install -e '.[tensorboard]'"),
    Package("tiktoken", "tiktoken tokenizers", False, "pip install -e '.[tiktoken]'"),
    Package("wandb", "the wandb tracker", False, "pip install -e '.[wandb]'"),
    Package("transformers", "conversion to and from Hugging Face", False, "pip install -e '.[hf]'"),
    Package("peft", "adapters of other models", False, "pip install -e '.[adapters]'"),
    Package("lm_eval", "zero-shot tasks", False, "pip install -e '.[eval]'"),
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """A package as it is installed. `version` None: not installed. `right`: installed in a wanted version."""

    package: Package
    version: str | None
    right: bool

    @property
    def problem(self) -> str | None:
        """A sentence on what is wrong and how to install it; None when the version is right."""
        package = self.package
        if self.right:
            return None
        state = "is missing" if self.version is None else f"{self.version} is not {package.wanted}"
        return f"{package.name} {state}: needed for {package.enables}. {package.install}"


def installed_packages() -> list[Installed]:
    """Every package of `PACKAGES`, found by its metadata and not imported."""
    return [_installed(package) for package in PACKAGES]


def system_facts() -> Iterator[tuple[str, str]]:
    """Yields (name, value as text) of facts about the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "host", f"{socket.gethostname()}, {platform.system()} {platform.release()}, {platform.machine()}"
    yield "python", platform.python_version()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "processor", f"{count_of(cores or 0, 'core')}, {memory / 1e9:,.0f} GB memory"
    yield "disk", f"{shutil.disk_usage('.').free / 1e9:,.0f} GB free in {os.getcwd()}"
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    yield "compiler", compiler or "no C++ compiler: training.compile and the installation of deepspeed need one"


def machine_warnings(num_gpus: int) -> Iterator[str]:
    """Yields a sentence with its remedy for each setting that works now and is likely to fail in a run."""
    if not wanted_versions("torch"):
        yield "megatron_tf itself is not installed, so versions of packages are not compared. pip install -e ."
    shared = "/dev/shm"
    if num_gpus > 1 and os.path.isdir(shared) and shutil.disk_usage(shared).total < 1e9:
        yield (
            f"{shared} has {shutil.disk_usage(shared).total / 1e6:,.0f} MB, too little for NCCL between {num_gpus} "
            "GPUs. Start the container with --ipc=host or --shm-size=8g."
        )
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files != resource.RLIM_INFINITY and open_files < 1024:
        yield f"only {open_files} files may be open at once. Raise it with ulimit -n 65536."
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.path.isdir("/sys/class/infiniband") and locked != resource.RLIM_INFINITY:
        yield (
            f"InfiniBand is here, but only {locked / 1e6:,.1f} MB of memory may be locked, which RDMA needs. Set "
            "ulimit -l unlimited (docker: --ulimit memlock=-1)."
        )


def _installed(package: Package) -> Installed:
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return Installed(package, None, False)
    return Installed(package, version, is_wanted(package.name, version))
