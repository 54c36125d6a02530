"""Tests of the memory that the machine and its control groups leave to a process."""

import sys

import pytest

from automodel_conv.files.free_memory import free_memory


@pytest.fixture
def machine(tmp_path):
    """Return a function that writes the files of a system and returns its free memory."""

    def made(files):
        for path, text in ({"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    1000 kB\n"} | files).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return free_memory(str(tmp_path))

    return made


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1000 << 10),
        ({"proc/meminfo": "MemTotal: 5 kB\n"}, None),
        ({"proc/meminfo": ""}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "5000\n",
                f"{V2}/a/b/memory.current": "4000\n",
                f"{V2}/a/b/memory.stat": "anon 9\ninactive_file 100\nactive_file 20\nfile 7000\n",
            },
            1120,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "4000\n",
                f"{V2}/a/memory.max": "4500\n",
                f"{V2}/a/memory.current": "4000\n",
            },
            500,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/not/seen/here\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "3000\n",
                f"{V1}/memory.usage_in_bytes": "4000\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "4000\n",
            },
            1000 << 10,
        ),
        ({"proc/self/cgroup": "nonsense\n"}, 1000 << 10),
        (
            {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "5000\n", f"{V2}/memory.current": "\n"},
            1000 << 10,
        ),
    ],
    ids=[
        "no groups",
        "old kernel",
        "empty",
        "version 2",
        "limit of a parent",
        "version 1",
        "no limit",
        "nonsense",
        "empty usage file",
    ],
)
def test_free_memory_is_limited_by_machine_and_groups(machine, files, free):
    assert machine(files) == free


def test_free_memory_is_unknown_without_system_files(tmp_path):
    assert free_memory(str(tmp_path)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports free memory")
def test_free_memory_of_this_machine_is_known():
    free = free_memory()
    assert free is not None
    assert free > 0
