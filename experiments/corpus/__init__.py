"""A text corpus of more than 100 MB from named packages in pinned versions: see `python -m experiments.corpus --help`."""
