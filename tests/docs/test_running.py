"""Tests of the runner: what a page may do, and how a page that is wrong fails."""

import textwrap
import time

import psutil
import pytest

from tests.docs.blocks import PageError, blocks_of
from tests.docs.running import run_blocks
from tests.loopback_hub import Hub


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a page; ``~~~`` in its text stands for a fence."""

    def run_page(text, **options):
        page = tmp_path / "page.md"
        page.write_text(textwrap.dedent(text).replace("~~~", "```"), encoding="utf-8")
        folder = tmp_path / "run"
        folder.mkdir()
        done = run_blocks(blocks_of(page.read_text(), page.name), page, folder, Hub({}), **options)
        done.work = folder / "work"
        return done

    return run_page


def ended(pid):
    """Return whether a process ends within a minute; one that nobody has waited for counts as ended."""
    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def blocks(text):
    return blocks_of(textwrap.dedent(text).replace("~~~", "```"), "page.md")


def test_python_blocks_share_names_and_see_what_bash_writes(run):
    done = run(
        """
        ~~~python
        from dataclasses import dataclass
        number = 6
        ~~~

        ~~~bash
        echo 7 > number.txt
        python -c 'print(8)'
        ~~~
        ~~~text
        8
        ~~~

        ~~~python
        print(number * int(open("number.txt").read()))
        ~~~
        ~~~text
        42
        ~~~
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8\n42\n"


def test_wrong_output_fails_and_shows_both(run):
    done = run(
        """
        ~~~python
        print("one")
        print("two")
        ~~~

        ~~~text
        one
        three
        ~~~
        """
    )
    assert done.returncode == 1
    assert "page.md:3: the block prints something else" in done.stderr
    assert "-three\n+two" in done.stderr


def test_missing_output_fails(run):
    assert run("~~~python\npass\n~~~\n~~~text\none\n~~~\n").returncode == 1


def test_ellipsis_matches_what_changes(run):
    done = run("~~~bash\necho 'at 7.3 GB/s   '; echo; echo end\n~~~\n~~~text\nat ... GB/s\n\nend\n~~~\n")
    assert done.returncode == 0, done.stderr


def test_spaces_next_to_an_ellipsis_keep_columns_in_line(run):
    table = "| speed   | 7.31 GB/s |\n| seconds |      12.5 |"
    shown = "| speed   |       ... |\n| seconds | ...       |"
    assert run(f"~~~bash\nprintf '%s' '{table}'\n~~~\n~~~text\n{shown}\n~~~\n").returncode == 0


def test_output_of_another_block_is_not_expected(run):
    assert run("~~~python\nprint(1)\n~~~\n\nA picture of it:\n\n~~~text\n[ ]\n~~~\n").returncode == 0


def test_exception_names_page_and_line(run):
    done = run(
        """
        ~~~python
        number = 0
        ~~~

        ~~~python
        def divide():
            return 1 / number

        divide()
        ~~~
        """
    )
    assert done.returncode == 1
    assert 'page.md", line 10, in <module>\n    divide()' in done.stderr
    assert 'page.md", line 8, in divide\n    return 1 / number' in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "driver.py" not in done.stderr


def test_bash_stops_at_the_first_failure_and_names_its_line(run):
    done = run("one\n\n~~~bash\ntrue\nfalse\necho not here\n~~~\n")
    assert done.returncode == 1
    assert "page.md:5: exit status 1" in done.stderr
    assert "page.md:4: bash ends with status 1" in done.stderr
    assert "not here" not in done.stdout


def test_nothing_runs_after_a_failure(run):
    done = run("~~~python\n1 / 0\n~~~\n~~~python\nopen('later', 'w')\n~~~\n")
    assert done.returncode == 1
    assert not (done.work / "later").exists()


@pytest.mark.parametrize(("language", "code"), [("python", "a =\n"), ("bash", "if true\n")], ids=["python", "bash"])
@pytest.mark.parametrize("mark", ["", "<!-- needs a GPU -->\n"], ids=["", "needs a GPU"])
def test_syntax_error_names_page_and_line(run, language, code, mark):
    done = run(f"{mark}~~~{language}\n{code}~~~\n")
    assert done.returncode == 1
    assert "page.md" in done.stderr.replace("page.md:", "", 1)
    assert "syntax" in done.stderr.lower()


@pytest.mark.parametrize(("has_gpu", "status"), [(False, 0), (True, 1)], ids=["without a GPU", "with a GPU"])
def test_block_for_a_gpu_runs_only_on_one(run, has_gpu, status):
    done = run("A line.\n<!-- needs a GPU -->\n~~~python\n1 / 0\n~~~\n", has_gpu=has_gpu)
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize(("package", "status"), [("no_such_package", 0), ("json", 1)])
def test_block_for_a_package_runs_only_with_it(run, package, status):
    done = run(f"A line.\n<!-- needs {package} -->\n~~~python\n1 / 0\n~~~\n")
    assert done.returncode == status, done.stderr


def test_variables_reach_the_blocks(run):
    done = run("~~~bash\necho $BUCKET\n~~~\n~~~text\nmodels\n~~~\n", variables={"BUCKET": "models"})
    assert done.returncode == 0, done.stderr


def test_page_that_does_not_end_is_killed_with_its_processes(run):
    done = run("~~~bash\nsleep 1000 & echo $! > pid; wait\n~~~\n", time_limit=8)
    assert done.returncode != 0
    assert "not finished after 8 s" in done.stderr
    assert ended(int((done.work / "pid").read_text()))


def test_titled_block_is_written_and_not_run(run):
    done = run(
        """
        ~~~python title="sub/train.py"
        print("from the file")
        raise SystemExit(3)
        ~~~

        ~~~bash
        python sub/train.py || echo $?
        ~~~
        ~~~text
        from the file
        3
        ~~~
        """
    )
    assert done.returncode == 0, done.stderr
    assert (done.work / "sub/train.py").read_text().startswith("print(")


def test_python_block_imports_what_a_titled_block_wrote(run):
    done = run('~~~python title="mine.py"\nvalue = 5\n~~~\n~~~python\nimport mine\nprint(mine.value)\n~~~\n')
    assert done.stdout == "5\n", done.stderr


def test_page_starts_in_an_empty_folder(run):
    assert run("~~~bash\nls -A\n~~~\n~~~python\nimport os\nprint(os.listdir())\n~~~\n").stdout == "[]\n"


def test_shown_blocks_do_not_run(run):
    assert run("~~~console\n$ false\n~~~\n\n~~~toml\na = \n~~~\n\n~~~text\nnothing\n~~~\n").returncode == 0


@pytest.mark.parametrize("language", ["", "py", "sh", "shell", "mermaid", "{.python}"])
def test_language_that_would_not_be_checked_is_refused(language):
    with pytest.raises(PageError, match=r"page\.md:3: unknown language"):
        blocks(f"one\n\n~~~{language}\nx\n~~~\n")


def test_code_without_a_fence_is_refused():
    with pytest.raises(PageError, match=r"page\.md:3: code in an indented paragraph"):
        blocks("one\n\n    x = 1\n")


@pytest.mark.parametrize("head", ["!!! note", "??? note", "???+ note", '=== "Tab"', "- item\n"])
def test_blocks_in_containers_are_found_with_their_lines(head):
    indent = "    "
    text = f"{head}\n\n{indent}<!-- needs a GPU -->\n{indent}```python\n{indent}if 1:\n{indent}    x\n{indent}```\n"
    [block] = blocks_of(text, "page.md")
    assert block.code == "if 1:\n    x\n"
    assert block.needs_gpu
    assert text.splitlines()[block.line - 1].strip() == "if 1:"


def test_block_in_an_admonition_of_a_tab_is_found():
    [block] = blocks_of('=== "Tab"\n\n    !!! note\n\n        ```bash\n        x\n        ```\n', "page.md")
    assert (block.language, block.code, block.line) == ("bash", "x\n", 6)
