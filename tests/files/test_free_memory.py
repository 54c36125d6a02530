"""The memory that the machine and its control groups leave to a process."""

import sys

import pytest

from automodel_conv.files.free_memory import free_memory


@pytest.fixture
def machine(tmp_path):
    """Write the files of a system; its free memory."""

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
        "of a parent",
        "version 1",
        "no limit",
        "nonsense",
        "no use told",
    ],
)
def test_free_memory_is_what_machine_and_groups_leave(machine, files, free):
    assert machine(files) == free


def test_a_system_that_tells_nothing_has_no_known_memory(tmp_path):
    assert free_memory(str(tmp_path)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_this_machine_has_free_memory():
    free = free_memory()
    assert free is not None
    assert free > 0
