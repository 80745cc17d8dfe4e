"""Files that come with the package but are no code: configurations and SLURM scripts."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped_files(name: str, source: str, ending: str) -> dict[str, Path]:
    """The files of a folder by name without `ending`: megatron_tf/`name` when installed, `source` in a source tree."""
    installed = PACKAGE / name
    folder = installed if installed.is_dir() else PACKAGE.parent / source
    return {path.name.removesuffix(ending): path for path in sorted(folder.glob(f"*{ending}"))}


def configurations() -> dict[str, Path]:
    return shipped_files("configs", "configs", ".yml")


def find_configuration(text: str) -> Path:
    """The file of this path; a name without a folder, which no file has, is that of a shipped configuration."""
    path = Path(text)
    if "/" not in text and not path.exists():
        return configurations().get(path.name.removesuffix(".yml"), path)
    return path


def studies() -> dict[str, Path]:
    return shipped_files("experiments", "experiments", ".yml")


def find_study(text: str) -> Path:
    """As `find_configuration`, of a study."""
    path = Path(text)
    if "/" not in text and not path.exists():
        return studies().get(path.name.removesuffix(".yml"), path)
    return path


def finetunings() -> dict[str, Path]:
    return shipped_files("configs/finetune", "configs/finetune", ".yml")


def find_finetuning(text: str) -> Path:
    """As `find_configuration`, for the configuration of a fine-tuning run."""
    path = Path(text)
    if "/" not in text and not path.exists():
        return finetunings().get(path.name.removesuffix(".yml"), path)
    return path


def slurm_scripts() -> dict[str, Path]:
    return shipped_files("slurm", "launch/slurm", ".sbatch")
