"""Stage 5: what the proofs say, as a table, figures and one self-contained HTML page.

Needs no torch; the page needs the extra [report], the table does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resq_deploy import artifacts
from resq_deploy.callable_module import make_callable
from resq_deploy.errors import InputError, MissingExtra
from resq_deploy.report import attacks, sources, table

if TYPE_CHECKING:
    from types import ModuleType


def stage_table(run_dir: Path | str) -> str:
    """The stage table of a run directory as terminal text; what is missing is named below it."""
    return table.text(table.build(sources.load(Path(run_dir))))


def report(paths: Sequence[Path | str] | Path | str, out: Path | str) -> Path:
    """Write the HTML page of one run directory, or of campaign stores and of the JSON files of
    `attack` and `bfa`, to `out`; returns `out`.

    For a run directory the stage table also goes beside the page, as table.json and table.md.
    The same inputs give the same bytes. InputError when nothing usable is given; MissingExtra
    without matplotlib or jinja2.
    """
    given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    out = Path(out)
    if not given:
        raise InputError("nothing to report given; expected a run directory or campaign stores")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; the name of an HTML file expected")
    page = _page()
    if any(path.is_dir() for path in given):
        if len(given) > 1:
            raise InputError(
                f"{len(given)} paths given, a folder among them; expected one run directory, or "
                "files only"
            )
        run = sources.load(given[0])
        made = table.build(run)
        html = page.run_page(run, made)
        table.write(made, out.parent)
    else:
        names = dict(zip(given, _names(given), strict=True))
        made_by_attacks = [path for path in given if path.suffix == ".json"]
        html = page.stores_page(
            [sources.campaign(p, names[p]) for p in given if p not in made_by_attacks],
            [attacks.read(p, names[p]) for p in made_by_attacks],
        )
    return artifacts.write(out, lambda p: p.write_text(html, encoding="utf-8"))


def _names(paths: Sequence[Path]) -> list[str]:
    """File names; with as much of the folder as tells equal ones apart."""
    full = [path.resolve() for path in paths]
    for depth in range(1, max(len(path.parts) for path in full) + 1):
        names = ["/".join(path.parts[-depth:]) for path in full]
        if len(set(names)) == len(names):
            return names
    raise InputError("a store is given twice; expected each one once")


def _page() -> ModuleType:
    try:
        from resq_deploy.report import page
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in ("matplotlib", "jinja2", "markupsafe"):
            raise MissingExtra(module, "report") from None
        raise
    return page


make_callable(__name__, report)

__all__ = ["report", "stage_table"]
