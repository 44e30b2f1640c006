"""Limits that an exported file must keep, checked on what was measured: the last step of a build.

Reads campaign stores and the JSON of other commands; runs nothing and needs no torch. A rate must
keep its limit with the far end of its interval, so that a file does not pass by luck.
"""

from resq_deploy.gate.evidence import Evidence, read
from resq_deploy.gate.limits import Check, check, read_file
from resq_deploy.gate.pages import failures, junit, markdown, plain

__all__ = [
    "Check", "Evidence", "check", "failures", "junit", "markdown", "plain", "read", "read_file",
]  # fmt: skip
