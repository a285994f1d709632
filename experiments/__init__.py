"""Studies of the methods: declared in YAML, run in pieces, kept as JSON, shown as tables and pictures.

``python -m experiments --help`` says how; ``docs/results/README.md`` has what was found.
"""
