"""Which runs take the same train step: those that differ only in its numbers, or in what they begin with."""

from collections.abc import Mapping
from typing import Any

from spannorm_jax.config import Config, flatten, rules
from spannorm_jax.errors import UserError
from spannorm_jax.model.initialisation import branch_multipliers

NUMBERS = tuple(key for key, rule in rules().items() if rule.number)
BEGINNING = tuple(key for key, rule in rules().items() if rule.beginning)


def program_key(config: Config) -> tuple[tuple[str, Any], ...]:
    """The options that are neither numbers nor a beginning: runs that agree on these may be lanes of one program."""
    own = [(key, value) for key, value in flatten(config).items() if key not in (*NUMBERS, *BEGINNING)]
    # Constants of the step, which an initialisation may leave.
    return (*own, ("the branches' multipliers", tuple(branch_multipliers(config.model).items())))


def check_lanes(configs: Mapping[str, Config]) -> None:
    """Checks that runs, by their names, may be lanes of one program.

    Raises:
      UserError: they are of different programs, or what they have in common does not go with lanes.
    """
    (first, config), *others = configs.items()
    for name, other in others:
        for (key, ours), (_, its) in zip(program_key(config), program_key(other), strict=True):
            if ours != its:
                raise UserError(
                    f"runs {first} ({key}={ours!r}) and {name} ({key}={its!r}) cannot be lanes of one program: lanes "
                    "may differ in the seed, the initialisation and the numbers of the step; train them one by one"
                )
    if config.mesh.expert != 1:
        raise UserError(
            f"lanes do not go with mesh.expert={config.mesh.expert}: under vmap each device would compute both ways of "
            "the experts' exchange; write mesh.expert=1, or train the runs one by one"
        )
    if config.metrics.wandb_project:
        raise UserError(
            f"lanes do not go with metrics.wandb_project={config.metrics.wandb_project!r}, since a process has one "
            "wandb run; leave the key empty, or train the runs one by one"
        )
