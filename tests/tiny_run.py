"""The toy's smallest variant on scenes, with random parameters, in the test's own process."""

import jax

from jaxmllm import recipes
from jaxmllm.train.setup import abstract_params, initial_params
from tests.conftest import settings


def tiny_run(scenes, **values):
    """The config."""
    config, _, *overrides = settings(scenes, **values)
    return recipes.override(recipes.load(config), overrides)


def random_params(run):
    """Parameters by path, on the run's mesh."""
    with jax.set_mesh(run.mesh.build()):
        return jax.jit(lambda: initial_params(run))()


def abstract(run):
    """Shapes and shardings of the parameters by path, on the run's mesh."""
    mesh = run.mesh.build()
    with jax.set_mesh(mesh):
        return abstract_params(run, mesh)[0]
