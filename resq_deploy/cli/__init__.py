"""Command line: parse, call one function, print.

Only click and our own errors are imported up here; a command imports what it needs when it
runs, so that `--help` answers at once and a campaign box needs no training libraries.

A new command stands in the module of its kind: decorate it with `@main.command()` and
`@json_option`, import inside, call one function, print with `output`.
"""

from resq_deploy.cli import attacks, campaigns, checks, stages, storage, workspace
from resq_deploy.cli.edge import main

__all__ = ["attacks", "campaigns", "checks", "main", "stages", "storage", "workspace"]
