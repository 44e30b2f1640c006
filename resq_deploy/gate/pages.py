"""The verdict for people and for build servers. The same checks give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from resq_deploy.gate.evidence import Evidence
from resq_deploy.gate.limits import Check


def failures(checks: Sequence[Check]) -> list[str]:
    """One line for every limit that is missed."""
    return [f"{c.name} is {c.measured}, {c.needed} needed" for c in checks if not c.passed]


def junit(checks: Sequence[Check]) -> str:
    """The checks as JUnit XML, which build servers show as tests."""
    suite = ElementTree.Element("testsuite", name="resq-deploy gate", errors="0")
    suite.set("tests", str(len(checks)))
    suite.set("failures", str(len(failures(checks))))
    for c in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=c.source, name=c.name)
        if not c.passed:
            failure = ElementTree.SubElement(case, "failure", message=failures([c])[0])
            failure.text = f"{failures([c])[0]} (n = {c.found.n}, {c.source})"
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def markdown(checks: Sequence[Check], evidence: Evidence) -> str:
    """The checks as a Markdown page: verdict, digest of the file, one row each."""
    missed = len(failures(checks))
    verdict = f"{missed} of {len(checks)} limits missed" if missed else "every limit is kept"
    lines = [
        f"# Gate: {verdict}",
        "",
        f"File with the SHA-256 `{evidence.model_sha256}`; intervals at "
        f"{100 * evidence.confidence:g} %. A limit holds for the far end of the interval.",
        "",
        "| limit | measured | needed | n | from | verdict |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.name} | {c.measured} | {c.needed} | {c.found.n} | `{c.source}` | "
        f"{'pass' if c.passed else '**fail**'} |"
        for c in checks
    ]
    return "\n".join(lines) + "\n"


def plain(checks: Sequence[Check], evidence: Evidence) -> dict[str, Any]:
    """The checks as JSON values."""
    return {
        "passed": not failures(checks),
        "model_sha256": evidence.model_sha256,
        "checks": [{**vars(c), "found": vars(c.found), "passed": c.passed} for c in checks],
    }
