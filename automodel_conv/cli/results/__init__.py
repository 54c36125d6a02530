"""The results of commands as ``--json`` prints them; see ``docs/cli-json.md``."""
