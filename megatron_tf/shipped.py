"""Files that come with the package and are not code: configurations, studies and SLURM scripts."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped_files(name: str, source: str, ending: str) -> dict[str, Path]:
    """Name without `ending` -> file, for the files that end in `ending`, of one folder: megatron_tf/`name` in an
    installed package, `source` in a source tree."""
    installed = PACKAGE / name
    folder = installed if installed.is_dir() else PACKAGE.parent / source
    return {path.name.removesuffix(ending): path for path in sorted(folder.glob(f"*{ending}"))}


def configurations() -> dict[str, Path]:
    return shipped_files("configs", "configs", ".yml")


def find_configuration(text: str) -> Path:
    """The path `text`; or, if that has no folder and no such file exists, the shipped configuration of that name."""
    path = Path(text)
    if "/" not in text and not path.exists():
        return configurations().get(path.name.removesuffix(".yml"), path)
    return path


def studies() -> dict[str, Path]:
    return shipped_files("experiments", "experiments", ".yml")


def find_study(text: str) -> Path:
    """As `find_configuration`, for a study."""
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
