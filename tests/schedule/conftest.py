"""Fixtures: schedules are built for the loads of ``tests/execution``."""

from tests.execution.conftest import cases

__all__ = ["cases"]  # fixtures
