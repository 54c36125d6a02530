"""The tests, in the same folders as the package: ``tests/<folder>/test_<module>.py``."""
