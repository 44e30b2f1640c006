"""The command group, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import warnings
from typing import Any

import click

from resq_deploy.errors import InputError, MissingExtra, ResqError

INTERRUPTED = 130
EXTRAS = dict.fromkeys(
    ("torch", "brevitas", "safetensors", "qonnx", "onnxoptimizer", "sklearn", "tflite"), "train"
) | {"art": "attack"}
"""Optional modules and the extra that brings them."""


class Edge(click.Group):
    """The one place where errors become a line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; ResqError, OSError and Ctrl-C end with one line, never a traceback."""
        warnings.filterwarnings("ignore", module="brevitas")  # about packages we do not use
        try:
            return super().invoke(ctx)
        except ResqError as error:
            _fail(ctx, str(error), error.exit_code)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "resq-deploy"
            _fail(ctx, f"{error.format_message()} ({where} --help)", error.exit_code)
        except ModuleNotFoundError as error:
            module = (error.name or "").partition(".")[0]
            if module not in EXTRAS:
                raise
            _fail(ctx, str(MissingExtra(module, EXTRAS[module])), InputError.exit_code)
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{where}{error.strerror or error}", InputError.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; everything finished so far is kept", INTERRUPTED)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"resq-deploy: error: {' '.join(message.split())}", err=True)
    ctx.exit(code)


@click.group(cls=Edge, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="resq-deploy", prog_name="resq-deploy")
def main() -> None:
    """Deploy quantized networks that keep working when memory and inputs are corrupted."""
