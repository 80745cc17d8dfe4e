"""Runs an evaluation from its configuration to its tables: the composition root of launch/evaluate.py."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.config.validate import validate_layout
from megatron_tf.diagnosis.run_facts import run_facts
from megatron_tf.engine.device import precision_problems
from megatron_tf.errors import ConfigError
from megatron_tf.evaluation.loaded import Evaluation, EvaluationRequest, TaskEvaluation
from megatron_tf.runtime.early_mistakes import told_to_all
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import NO_FACTS, join_ranks
from megatron_tf.runtime.session import session
from megatron_tf.tasks.language_model.section import check_reads_text
from megatron_tf.telemetry.console import Console


def evaluate(config: RunConfig, environment: LaunchEnvironment, request: EvaluationRequest) -> None:
    """Evaluates, prints tables and writes JSON. Raises the same UserError on every rank for errors that the user can
    correct."""
    # Without a backward pass a sample fits on one rank: the ranks share the samples instead of their positions.
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context": 1})})
    with told_to_all(environment):
        name = task_of(config.model).evaluation
        if not name:
            check_reads_text(config.model, "this evaluation")
        of_task: TaskEvaluation = resolve_name(name)
        validate_layout(config, environment.world_size)
        if problems := [*precision_problems(config), *of_task.request_problems(config, request)]:
            raise ConfigError(problems)
    facts = NO_FACTS
    if environment.world_size > 1:
        options = {f"--{name.replace('_', '-')}": value for name, value in asdict(request).items() if value != ()}
        facts = run_facts("evaluate", [config], options, request.data)
    device = join_ranks(environment, config.parallel.timeout_seconds, facts=facts)
    evaluation = Evaluation(config, request, environment.rank, device, Console(rank=environment.rank))
    with session(environment, config.run.hang_seconds) as watchdog:
        watchdog.report_to(evaluation.console, Path(config.run.dir))
        of_task.evaluate(evaluation, watchdog)
