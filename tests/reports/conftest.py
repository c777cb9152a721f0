"""Fixtures of other folders that reports are tested with."""

from tests.cli.conftest import moa  # noqa: F401
from tests.experiments.conftest import ablate, make_grid  # noqa: F401
