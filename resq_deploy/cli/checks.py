"""What a file must hold: `verify`, `gate`."""

from __future__ import annotations

from pathlib import Path

import click

from resq_deploy.cli.edge import main
from resq_deploy.cli.options import (
    OUT_PATH,
    PATH,
    confidence_option,
    json_option,
    load_data,
    radii,
    rates,
    size,
    with_data,
)
from resq_deploy.cli.output import emit_json, table, write_text


@main.command()
@click.argument("model", type=PATH)
@click.option("--against", type=PATH, metavar="OTHER", help="Another ONNX file to compare with.")
@with_data
@json_option
def verify(
    model: Path,
    against: Path | None,
    data: str,
    images: int | None,
    root: Path | None,
    json_file: Path | None,
) -> None:
    """Accuracy of MODEL in onnxruntime at the optimization levels off and all."""
    from resq_deploy import inject as stage
    from resq_deploy import runtime

    other = None if against is None else runtime.read_model(against)
    found = stage.verify(runtime.read_model(model), load_data(data, images, root), against=other)
    for name in ("accuracy", "against_accuracy"):
        for level, count in found.get(name, {}).items():
            label = "model" if name == "accuracy" else "other"
            click.echo(f"{label}, optimization {level}: {count['n_correct']}/{count['n_total']}")
    agreements = {"off against all": found["off_against_all"]}
    agreements |= {f"against other, {k}": v for k, v in found.get("against", {}).items()}
    for label, row in agreements.items():
        click.echo(
            f"{label}: largest difference {row['max_abs_diff']:g}, same top-1 on "
            f"{row['n_top1_equal']}/{row['n_total']}"
        )
    emit_json(found, json_file)


def _limits_file(ctx: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Limits from a TOML file, as defaults of their options: what stands on the line wins."""
    if path is not None:
        from resq_deploy import gate as stage

        ctx.default_map = stage.read_file(path)


@main.command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="STORE|JSON...")
@click.option("--min-clean", callback=rates, metavar="A", help="Least accuracy without faults.")
@click.option("--min-accuracy", callback=rates, metavar="A,A", help="Least accuracy with faults.")
@click.option("--at-ber", callback=rates, metavar="R,R", help="Error rates of --min-accuracy.")
@click.option("--max-sdc", callback=rates, metavar="P", help="Most SDC of single flips.")
@click.option("--min-adversarial", callback=rates, metavar="A,A", help="Least when attacked.")
@click.option("--at-eps", callback=radii, metavar="E,E", help="Radii of --min-adversarial.")
@click.option("--max-parity-steps", callback=rates, metavar="N", help="Most between executions.")
@click.option("--max-weight-bytes", callback=size, metavar="SIZE", help="Such as 100KiB.")
@confidence_option
@click.option(
    "--limits", type=PATH, is_eager=True, expose_value=False, callback=_limits_file,
    metavar="FILE", help="Take limits from a TOML file.",
)  # fmt: skip
@click.option("--model", type=PATH, help="ONNX file that all this must have been measured on.")
@click.option("--junit", "junit_file", type=OUT_PATH, metavar="FILE", help="Write JUnit XML.")
@click.option("--markdown", "markdown_file", type=OUT_PATH, metavar="FILE", help="Write a page.")
@json_option
def gate(
    paths: tuple[Path, ...],
    confidence: float,
    model: Path | None,
    junit_file: Path | None,
    markdown_file: Path | None,
    json_file: Path | None,
    max_weight_bytes: int | None,
    **limits: tuple[float, ...],
) -> None:
    """End with exit code 1 when a measurement in STOREs and JSON files misses its limit."""
    from resq_deploy import gate as stage
    from resq_deploy.errors import GateFailed

    evidence = stage.read(paths, confidence=confidence, model=model)
    limits["max_weight_bytes"] = () if max_weight_bytes is None else (max_weight_bytes,)
    checks = stage.check(evidence, limits)
    table(
        [[c.name, c.measured, c.needed, c.found.n, "pass" if c.passed else "FAIL", c.source]
         for c in checks],
        ["limit", "measured", "needed", "n", "", "from"],
    )  # fmt: skip
    for file, text in ((junit_file, stage.junit(checks)),
                       (markdown_file, stage.markdown(checks, evidence))):  # fmt: skip
        if file is not None:
            write_text(text, file)
    emit_json(stage.plain(checks, evidence), json_file)
    missed = stage.failures(checks)
    if missed:
        raise GateFailed(f"{len(missed)} of {len(checks)} limits missed: {'; '.join(missed)}")
