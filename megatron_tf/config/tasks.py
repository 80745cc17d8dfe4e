"""The tasks by the name that `model.task` gives. `tasks.base` says what each must provide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_tf.registry import Registry

if TYPE_CHECKING:
    from megatron_tf.config.sections.model import Model
    from megatron_tf.tasks.base import Task

TASKS: Registry[Task] = Registry(
    {
        "language_model": "megatron_tf.tasks.language_model.task:LANGUAGE_MODEL",
        "image_classification": "megatron_tf.tasks.image_classification.task:IMAGE_CLASSIFICATION",
    },
)


def task_of(model: Model) -> Task:
    """The task that `model` names."""
    return TASKS[model.task]
