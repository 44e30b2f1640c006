"""Pages of which a benchmark writes a part: what stands between two marks."""

from __future__ import annotations

from pathlib import Path

from resq_deploy import artifacts


def put(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- MARK:begin -->` and `<!-- MARK:end -->` in a page."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    whole = f"{before}{begin}\n{text}\n{end}{after}"
    artifacts.write(page, lambda p: p.write_text(whole, encoding="utf-8"))
