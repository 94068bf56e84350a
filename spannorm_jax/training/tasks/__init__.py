"""The tasks, and which one a config asks for."""

from spannorm_jax.config import Config
from spannorm_jax.training.task import Task
from spannorm_jax.training.tasks.text import TEXT


def task_of(config: Config) -> Task:
    """Text: there is no other yet, and so no option."""
    return TEXT
