"""Tests of the documentation: every code block of a page runs, and the site is complete.

    python -m pytest tests/docs -k quickstart    # the blocks of docs/quickstart.md
    python -m pytest tests/docs -k README
    make test-docs                               # builds the site, checks it, and runs the blocks of all pages

The blocks of a page run from top to bottom, in one process of their own and in an empty folder:

- ``python`` runs. All Python blocks of a page share their names.
- ``python title="train.py"`` is written to that file, and does not run itself.
- ``bash`` runs with ``bash -e``. ``python``, ``torchrun`` and ``automodel-conv`` are those of this environment.
- ``text`` directly after a block that ran is the expected output on stdout, in which ``...`` matches anything,
  together with the spaces next to it.
- A block below a line ``<!-- needs a GPU -->`` is compiled. With a GPU, it runs.
- A block below a line ``<!-- needs s3fs -->`` is compiled. Where that package is installed, it runs.
- ``console``, ``toml``, ``yaml``, ``json``, ``dockerfile`` and the other languages of ``blocks.SHOWN`` do not run.

Names of the Hub, such as ``Qwen/Qwen3-30B-A3B``, are small checkpoints of the same type, which a Hub on the loopback
serves (``checkpoints.py``). ``s3://models`` and ``gs://models`` are buckets on the loopback, with the folder
``Qwen3-30B-A3B``.
"""
