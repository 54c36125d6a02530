"""Tests of the counts of executors."""

from automodel_conv.execution.stats import CopyCounts, LoadStats


def test_work_is_added_by_field():
    assert CopyCounts(1, 2) + CopyCounts(10, 20) == CopyCounts(11, 22)
    assert sum([CopyCounts(1, 2), CopyCounts(3, 4)], CopyCounts(0, 0)) == CopyCounts(4, 6)
    assert sum([], CopyCounts(0, 0)) == CopyCounts(0, 0)


def test_load_to_the_host_has_no_work_on_a_device():
    stats = LoadStats(10, 2, 30)
    assert (stats.counts, stats.device_scratch_bytes, stats.without_kernels) == (CopyCounts(0, 0), 0, None)
