"""More than 100 MB of text from packages in pinned versions: `python -m experiments.corpus --help`."""
