"""The tests, room by room as the package has them: ``tests/<room>/test_<module>.py``."""
