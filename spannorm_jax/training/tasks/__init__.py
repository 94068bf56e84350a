"""The tasks, and which one a config asks for."""

from spannorm_jax.config import Config
from spannorm_jax.training.task import Task
from spannorm_jax.training.tasks.image import IMAGE
from spannorm_jax.training.tasks.text import TEXT

TASKS = {"text": TEXT, "image": IMAGE}


def task_of(config: Config) -> Task:
    return TASKS[config.task]
