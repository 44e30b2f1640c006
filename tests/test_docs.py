"""Documentation against the code: fields, defaults, commands, links, and what must not leak."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from resq_deploy import recipe
from resq_deploy.cli import main

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "calibration", "docs", "examples", "models", "resq_deploy", "tests")
DOCS = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])


def sources() -> list[Path]:
    """Every text file of the project, whether it is a checkout or an unpacked sdist."""
    found = [p for p in ROOT.iterdir() if p.is_file()]
    for folder in FOLDERS:
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file()]
    binary = {".onnx", ".safetensors", ".npz", ".png", ".pyc"}
    return [p for p in found if p.suffix not in binary and "__pycache__" not in p.parts]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --------------------------------------------------------------------------- recipe fields


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{field}.")
        else:
            yield prefix + field, info


def rows(path: Path) -> dict[str, list[str]]:
    """Field -> cells of the tables that begin with `field`; a row may name several fields."""
    found: dict[str, list[str]] = {}
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == "field":
            inside = True
        elif inside and not cells[0].startswith("---"):
            for field in re.findall(r"`([^`]+)`", cells[0]):
                assert field not in found, f"{field} stands twice in {path.name}"
                found[field] = cells[1:]
    return found


def plain(text: str) -> Any:
    """The value that a default cell stands for."""
    if "," in text:
        return tuple(plain(part.strip()) for part in text.split(","))
    if text in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text]
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except ValueError:
        return text


def same(documented: str, default: Any) -> bool:
    value = plain(documented)
    if isinstance(default, str):
        return documented == default
    if isinstance(default, tuple):
        value = value if isinstance(value, tuple) else (value,)
        return value == pytest.approx(default)
    if default is None or isinstance(default, bool):
        return value is default
    return value == pytest.approx(default)


@pytest.mark.parametrize(
    ("model", "file"),
    [(recipe.Recipe, "models/README.md"), (recipe.CalibrationManifest, "calibration/README.md")],
    ids=["recipe", "calibration"],
)
def test_every_field_has_meaning_unit_and_default(model: type[BaseModel], file: str) -> None:
    documented, fields = rows(ROOT / file), dict(leaves(model))
    wrong = []
    for field, info in fields.items():
        default = "required" if info.is_required() else info.get_default(call_default_factory=True)
        cells = documented.get(field, [])
        if len(cells) != 3 or not all(cells) or not same(cells[2], default):
            wrong.append(f"| `{field}` | {info.description} | UNIT | {default} |  (found: {cells})")
    assert not wrong, f"rows wanted in {file}:\n" + "\n".join(wrong)
    assert not set(documented) - set(fields), f"fields in {file} that do not exist"


def test_the_workspace_is_valid() -> None:
    for path in sorted((ROOT / "models").glob("*.toml")):
        loaded = recipe.load(path)
        assert path.stem == loaded.name
        assert f"]({path.name})" in (ROOT / "models/README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "calibration").glob("*.toml")):
        recipe.load_manifest(path)
        assert f"]({path.name})" in (ROOT / "calibration/README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------- commands


def commands() -> dict[str, click.Command]:
    return dict(sorted(main.commands.items()))


@pytest.mark.parametrize("command", commands())
def test_every_command_and_option_stands_in_cli_md(command: str) -> None:
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(command)}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    options = [p for p in commands()[command].params if isinstance(p, click.Option)]
    wanted = {
        flag: f"| `{flag}` | {option.help} | {option.default} |"
        for option in options
        for flag in [*option.opts, *option.secondary_opts]
        if flag.startswith("--")
    }
    assert section, f"docs/cli.md wants a section:\n## {command}\n" + "\n".join(wanted.values())
    missing = [row for f, row in wanted.items() if not re.search(rf"`{f}[ `]", section[1])]
    assert not missing, f"section {command} of docs/cli.md wants rows:\n" + "\n".join(missing)
    named = set(re.findall(r"^\| `(--[a-z0-9-]+)", section[1], re.M))
    assert not named - set(wanted), f"docs/cli.md documents what {command} does not have"


def test_cli_md_has_no_commands_that_do_not_exist() -> None:
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    used = set(re.findall(r"^## ([a-z-]+)$", text, re.M))
    assert not used - set(commands())


def code_lines() -> Iterator[tuple[str, str]]:
    """(file, command line) of every code block, continuation lines joined."""
    for path in DOCS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = False
        for line in text.splitlines():
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif fenced or line.startswith("    "):
                yield name(path), line.strip().removeprefix("$ ")


def invocations() -> list[tuple[str, str]]:
    return [(f, line) for f, line in code_lines() if line.startswith("resq-deploy ")]


@pytest.mark.parametrize(("file", "line"), invocations())
def test_documented_invocations_parse(file: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    if words[0].startswith("-"):
        return
    assert words[0] in commands(), f"{file}: no command {words[0]!r} in: {line}"
    command = commands()[words[0]]
    with click.Context(command, info_name=words[0]) as context:
        values, rest, _ = command.make_parser(context).parse_args(list(words[1:]))
    assert not rest, f"{file}: too many arguments in: {line}"
    if "help" not in values:
        for parameter in command.params:
            given = values.get(parameter.name or "")
            # click says None, an empty tuple or, from 8.3 on, a sentinel for what was not given
            absent = given in (None, ()) or type(given).__name__ == "Sentinel"
            assert not (absent and parameter.required), f"{file}: {parameter.name} in: {line}"


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    used = {line.split()[1] for _, line in code_lines() if line.startswith("make ")}
    inline = {m for p in DOCS for m in re.findall(r"`make ([a-z-]+)", p.read_text("utf-8"))}
    assert {"demo", "test"} <= used and not (used | inline) - targets


# --------------------------------------------------------------------------- text


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_local_links_resolve(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{name(path)} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), f"{name(path)}: no heading for {target}"


def test_readme_keeps_the_region_of_the_measured_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = text.index("<!-- table:begin -->"), text.index("<!-- table:end -->")
    assert begin < end and begin < 2000, "the table stands on the first screen"


def test_no_machine_path_and_no_registry_host() -> None:
    # written in pieces, so that this file does not name them either
    paths = ["/" + word + "/" for word in ("work", "root", "opt", "home", "Users")]
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org"]
    words = [*paths, *hosts, "file:" + "//", "index" + "-url", "find" + "-links"]
    # a home of nobody ("x") is an example
    pattern = re.compile(r"(?<![\w.~-])(" + "|".join(map(re.escape, words)) + ")(?!x/)")
    leaks = [
        f"{name(path)}:{number}: {line.strip()[:80]}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not leaks, "\n".join(leaks)


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = {re.sub(r"[-_.]+", "-", n).lower() for n in pins}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["report"], *extras["attack"]]
    wanted += extras["dev"]
    names = [re.match(r"[\w.-]+", line)[0].lower() for line in wanted]  # type: ignore[index]
    assert not [n for n in names if n not in pinned]
    assert pins["torch"] == "2.13.0"
    assert not [v for v in pins.values() if "+" in v], "no local builds in the pins"


@pytest.mark.parametrize("module", ["bits", "quantize", "metrics", "seeds"])
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"resq_deploy.{module}"))
    assert result.attempted > 0 and result.failed == 0
