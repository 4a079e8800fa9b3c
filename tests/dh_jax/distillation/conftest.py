"""The real teacher of the slow tests here is that of the models' tests."""

from tests.dh_jax.models.conftest import smollm2_folder

__all__ = ["smollm2_folder"]
