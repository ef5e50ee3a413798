"""The bench: named cases, contestants and a runner; `python -m bench --help`."""
