"""A module imports only from its own floor or below, and heavy packages only where they are allowed.

Imports are read from the syntax tree, so that those inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.__main__ import COMMANDS

PROJECT = Path(__file__).parents[1]
# From the ground up. A package stands for all its modules, unless a module of it is named itself.
FLOORS = (
    {
        "megatron_tf.interrupt",
        "megatron_tf.errors",
        "megatron_tf.checks",
        "megatron_tf.durable",
        "megatron_tf.arguments",
        "megatron_tf.caches",
        "megatron_tf.compiling",
        "megatron_tf.native",
        "megatron_tf.libraries",
        "megatron_tf.open_files",
        "megatron_tf.paths",
        "megatron_tf.shipped",
        "megatron_tf.streams",
        "megatron_tf.text_files",
        "megatron_tf.registry",
        "megatron_tf.requirements",
        "megatron_tf.telemetry.text",
    },
    {
        "megatron_tf.activations",
        "megatron_tf.architectures",
        "megatron_tf.tasks",
        "megatron_tf.config",
        "megatron_tf.optimizers",
    },
    {"megatron_tf.state"},
    {
        "megatron_tf.parallel",
        "megatron_tf.tasks.classes",
        "megatron_tf.tasks.soft_targets",
        "megatron_tf.tasks.triton_loss",
        "megatron_tf.telemetry",
        "megatron_tf.runtime",
    },
    {
        "megatron_tf.model",
        "megatron_tf.activations.function",
        "megatron_tf.activations.gelu_l2_norm",
        "megatron_tf.activations.l2_norm",
        "megatron_tf.activations.l2_norm_gelu",
        "megatron_tf.activations.softmax",
        "megatron_tf.architectures.tokenformer.block",
        "megatron_tf.architectures.transformer.block",
        "megatron_tf.data",
        # what a task has that needs torch, or reads data
        "megatron_tf.tasks.data",
        "megatron_tf.tasks.layers",
        "megatron_tf.tasks.language_model.checks",
        "megatron_tf.tasks.language_model.data",
        "megatron_tf.tasks.language_model.layers",
        "megatron_tf.tasks.image_classification.data",
        "megatron_tf.tasks.image_classification.layers",
    },
    {"megatron_tf.checkpoint"},
    {"megatron_tf.growth"},
    # what a run would cost (arithmetic, no torch)
    {"megatron_tf.costs"},
    # files of others, what the machines are worth, and text to try it all with
    {"megatron_tf.convert", "megatron_tf.diagnosis", "megatron_tf.corpora"},
    {"megatron_tf.engine"},
    # a model from a checkpoint, sampling, scoring, pruning, adapters of other models; speeds: independent of training
    {
        "megatron_tf.inference",
        "megatron_tf.evaluation",
        "megatron_tf.benchmark",
        "megatron_tf.pruning",
        "megatron_tf.adapters",
    },
    {"megatron_tf.training", "megatron_tf.finetuning"},
    # proofs of layouts and of resuming; studies, which start runs as users do
    {"megatron_tf.verification", "megatron_tf.study"},
    # `megatron_tf.train` is found in training when it is asked for
    {"megatron_tf.commands", "megatron_tf.__main__", "megatron_tf.entry", "megatron_tf"},
    {"launch", "tools"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# package -> where it may be imported
RESERVED = {
    "PIL": ("megatron_tf.data.images.",),
    "datasets": ("megatron_tf.evaluation.lm_harness",),
    "deepspeed": ("megatron_tf.engine.deepspeed.",),
    "lm_eval": ("megatron_tf.evaluation.lm_harness",),
    "matplotlib": ("megatron_tf.telemetry.plot",),
    "peft": ("megatron_tf.benchmark.adapters", "megatron_tf.adapters.branch", "megatron_tf.adapters.tuner"),
    "pyarrow": (
        "megatron_tf.data.images.parquet",
        "megatron_tf.data.preparation.parquet",
        "megatron_tf.evaluation.eval_data",
    ),
    "sentencepiece": ("megatron_tf.data.tokenizer",),
    "tensorboard": ("megatron_tf.telemetry.trackers",),
    "tiktoken": ("megatron_tf.data.tiktoken_files",),
    "timm": ("megatron_tf.benchmark.images",),
    "torch.utils.tensorboard": ("megatron_tf.telemetry.trackers",),
    "transformers": (
        "megatron_tf.adapters.export",
        "megatron_tf.benchmark.serving",
        "megatron_tf.adapters.loading",
        "megatron_tf.convert.huggingface.verify",
    ),
    "vllm": ("megatron_tf.adapters.vllm_plugin",),
    "wandb": ("megatron_tf.telemetry.trackers",),
}
NO_TORCH = (
    "megatron_tf.adapters.command_line",
    "megatron_tf.interrupt",
    "megatron_tf.errors",
    "megatron_tf.checks",
    "megatron_tf.durable",
    "megatron_tf.arguments",
    "megatron_tf.caches",
    "megatron_tf.compiling",
    "megatron_tf.native",
    "megatron_tf.libraries",
    "megatron_tf.runtime.host_memory",
    "megatron_tf.paths",
    "megatron_tf.shipped",
    "megatron_tf.streams",
    "megatron_tf.__main__",
    "megatron_tf.entry",
    "megatron_tf.text_files",
    "megatron_tf.activations.base",
    "megatron_tf.activations.built_in",
    "megatron_tf.architectures.base",
    "megatron_tf.architectures.spec",
    "megatron_tf.architectures.work",
    "megatron_tf.architectures.tokenformer.architecture",
    "megatron_tf.architectures.transformer.architecture",
    "megatron_tf.registry",
    "megatron_tf.requirements",
    "megatron_tf.tasks.base",
    "megatron_tf.tasks.language_model.perplexity",
    "megatron_tf.tasks.language_model.section",
    "megatron_tf.tasks.language_model.task",
    "megatron_tf.tasks.image_classification.section",
    "megatron_tf.tasks.image_classification.task",
    "megatron_tf.config",
    "megatron_tf.state.lr_rule",
    "megatron_tf.state.optimizer_states",
    "megatron_tf.state.parameters",
    "megatron_tf.state.ranges",
    "megatron_tf.telemetry.text",
    "megatron_tf.growth.axes",
    "megatron_tf.growth.candidates",
    "megatron_tf.growth.layers",
    "megatron_tf.growth.methods",
    "megatron_tf.growth.tokens",
    "megatron_tf.optimizers",
    "megatron_tf.growth.rules",
    "megatron_tf.costs",
    "megatron_tf.diagnosis.installation",
    "megatron_tf.diagnosis.report",
    "megatron_tf.diagnosis.software",
    "megatron_tf.diagnosis.verdict",
    "megatron_tf.runtime.environment",
    "megatron_tf.runtime.network",
    "megatron_tf.runtime.slurm_hosts",
    "megatron_tf.activations.overlap",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Goes into every export and runs there without us.
REMOTE_CODE = [PROJECT / "megatron_tf" / room / "remote_code" for room in ("convert/huggingface", "adapters")]
MODULES = {
    module_name(path): path
    for folder in ("megatron_tf", "launch", "tools")
    for path in (PROJECT / folder).rglob("*.py")
    if path.parent not in REMOTE_CODE
}


def imports_of(source: str) -> set[str]:
    """Dotted names of all that `source` imports: `from a.b import c` gives a.b.c if that is a module, else a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in submodules if name in MODULES or name in RESERVED} or {node.module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return names


IMPORTS = {name: imports_of(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor_of(module: str) -> int | None:
    """The floor of the longest name in FLOORS that `module` lies within; the bare package is only itself."""
    names = [name for name in FLOOR_OF if is_within(module, name) and (name != "megatron_tf" or module == name)]
    return FLOOR_OF[max(names, key=len)] if names else None


def too_high(module: str, imported: set[str]) -> list[str]:
    own = floor_of(module)
    assert own is not None
    return sorted(name for name in imported if name in MODULES and (floor_of(name) or 0) > own)


def misplaced(module: str, imported: set[str]) -> list[str]:
    """The imports that RESERVED keeps for other modules."""
    return sorted(
        name
        for name in imported
        for package, places in RESERVED.items()
        if is_within(name, package) and not module.startswith(places)
    )


def test_every_module_has_a_floor():
    assert len(MODULES) > 30
    assert [module for module in MODULES if floor_of(module) is None] == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_from_above(module):
    assert too_high(module, IMPORTS[module]) == []


@pytest.mark.parametrize("module", MODULES)
def test_reserved_packages(module):
    assert misplaced(module, IMPORTS[module]) == []


def test_remote_code_needs_torch_and_transformers_alone():
    files = [file for folder in REMOTE_CODE for file in folder.glob("*.py")]
    own = {f"from .{file.stem} import" for file in files}
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        absolute = "\n".join(
            re.sub(r"\S.*", "pass", line) if line.lstrip().startswith(tuple(own)) else line for line in lines
        )
        found = {name.split(".")[0] for name in imports_of(absolute)}
        library = {"transformers"}
        if file.stem.startswith("image_processing_"):
            library |= {"math", "numpy", "PIL"}
        elif file.stem.endswith("_timm"):
            library = {"timm", "importlib", "json", "pathlib", "sys", "tokenformer_export", "types"}
        assert found <= {"__future__", "collections", "torch", "typing"} | library, file
    assert len(files) == 9


def test_a_command_imports_no_other_command():
    commands = [name for name in MODULES if name.startswith("megatron_tf.commands.")]
    assert {f"megatron_tf.commands.{command.module}" for command in COMMANDS.values()} == set(commands) - {
        "megatron_tf.commands"
    }
    assert [(name, other) for name in commands for other in IMPORTS[name] if other in commands] == []


def test_a_script_only_names_its_command():
    for name, file in MODULES.items():
        if name.split(".")[0] in ("launch", "tools"):
            last = ast.unparse(ast.parse(file.read_text(encoding="utf-8")).body[-1])
            assert last.startswith("if __name__ == '__main__':\n    from megatron_tf.__main__ import run\n    run("), (
                name
            )
            command = ast.literal_eval(last.rpartition("run(")[2].removesuffix(")"))
            assert COMMANDS[command].module == file.stem


def test_every_script_ends_quietly_on_control_c_from_its_first_import_on():
    for name, file in MODULES.items():
        if name.split(".")[0] in ("launch", "tools"):
            first = ast.parse(file.read_text(encoding="utf-8")).body[2]  # after docstring and __future__
            assert ast.unparse(first).startswith(
                "if __name__ in ('__main__', '__mp_main__'):\n    from megatron_tf.interrupt"
            ), name


def test_breaches_are_seen():
    """The rules above find what they are there to find, wherever it is written."""
    lazily = imports_of(
        "def f():\n    from megatron_tf.engine.deepspeed import engine\n    import deepspeed.ops as ops"
    )
    assert lazily == {"megatron_tf.engine.deepspeed.engine", "deepspeed.ops"}
    assert too_high("megatron_tf.checkpoint.source", lazily) == ["megatron_tf.engine.deepspeed.engine"]
    assert misplaced("megatron_tf.checkpoint.source", lazily) == ["deepspeed.ops"]
    assert misplaced("megatron_tf.engine.deepspeed.engine", lazily) == []
    assert misplaced("megatron_tf.commands.generate_text", imports_of("from transformers import AutoModel")) == [
        "transformers"
    ]
    assert misplaced("megatron_tf.commands.train", imports_of("from torch.utils import tensorboard")) == [
        "torch.utils.tensorboard"
    ]
    assert too_high("megatron_tf.config.validate", {"megatron_tf.config.topology"}) == []
    assert too_high("megatron_tf.config.validate", {"megatron_tf.parallel.groups"}) == ["megatron_tf.parallel.groups"]
    with pytest.raises(AssertionError, match="relative"):
        imports_of("from . import methods")


def loaded_by(modules: tuple[str, ...], packages: tuple[str, ...]) -> str:
    """Which of `packages` a fresh interpreter has loaded after importing `modules`, separated by spaces."""
    script = f"import sys, {', '.join(modules)}; print(*[name for name in {packages!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_alone_loads_nothing():
    assert loaded_by(("megatron_tf",), ("torch", "deepspeed", "numpy", "pydantic", "yaml")) == ""


def test_arithmetic_starts_without_torch():
    modules = tuple(name for name in MODULES if any(is_within(name, package) for package in NO_TORCH))
    assert len(modules) >= len(NO_TORCH)
    assert loaded_by(modules, ("torch", "deepspeed", "numpy")) in ("", "numpy")


FIRST = """
import importlib, os, sys
import pydantic, torch, yaml  # what takes long, once for all

failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, repr(error))
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(bool(failed))
"""


@pytest.mark.slow
def test_any_module_can_be_the_first_that_is_imported():
    done = subprocess.run([sys.executable, "-c", FIRST, *MODULES], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_everything_but_deepspeed_s_engine_and_peft_s_method_starts_without_optional_packages():
    # what a class of theirs is the base of
    derived = ("megatron_tf.engine.deepspeed.", "megatron_tf.adapters.branch", "megatron_tf.adapters.tuner")
    modules = tuple(name for name in MODULES if name.startswith("megatron_tf.") and not name.startswith(derived))
    for required in ("megatron_tf.model", "megatron_tf.checkpoint", "megatron_tf.training.run"):
        assert required in modules
    assert (
        loaded_by(
            modules,
            (
                "deepspeed",
                "lm_eval",
                "peft",
                "datasets",
                "wandb",
                "tensorboard",
                "sentencepiece",
                "transformers",
                "pyarrow",
                "PIL",
                "tiktoken",
            ),
        )
        == ""
    )
