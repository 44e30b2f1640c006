"""An exported folder in the tools of others: does each take the files, and what does it answer?

    python benchmarks/clients.py work/export --data cifar10 --images 1000 --environments work/env

Every tool gets a virtual environment of its own under `--environments` (made with pip when it is
not there: their pins conflict), and runs the files of the folder. Outputs are compared with those
of onnxruntime, in steps of the output code.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from tabulate import tabulate

from resq_deploy import artifacts, data, runtime
from resq_deploy.errors import InputError

PACKAGES = {
    "litert": [["ai-edge-litert==2.3.0"]],
    "tflite-micro": [["tflite-micro==0.dev20261023182759"]],
    "vela": [["ethos-u-vela==5.2.0"]],
    "hls4ml": [["hls4ml==1.3.0", "qonnx==1.0.0", "onnx==1.22.0"]],
    # Its front end needs no more; all of its dependencies are gigabytes (PyTorch with CUDA).
    "finn": [
        ["qonnx==1.0.0", "onnx==1.21.0", "onnxruntime==1.25.1", "rich==13.9.4"],
        ["--no-deps", "finn-plus==1.6.1"],
    ],
}
"""What pip installs for a tool, call by call, into its own environment; others run in this one."""
INSIDE = Path(__file__).parent / "in_clients"
"""Programs that run in those environments."""


def environment(client: str, folder: Path) -> Path:
    """The Python of the client's environment, which is made if it is not there."""
    home = folder / client
    python, ready = home / "bin" / "python", home / "installed.json"
    wanted = json.dumps(PACKAGES[client])
    if not (ready.is_file() and ready.read_text() == wanted):  # an interrupted pip leaves none
        venv.create(home, with_pip=True, clear=True)
        for packages in PACKAGES[client]:
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *packages], check=True)
        ready.write_text(wanted)
    return python


def output_scale(model: onnx.ModelProto) -> float:
    """Scale of the quantizer on the logits."""
    stored = {t.name: t for t in model.graph.initializer}
    (last,) = [n for n in model.graph.node if n.output[0] == model.graph.output[0].name]
    return float(numpy_helper.to_array(stored[last.input[1]]))


class Folder:
    """An exported folder, images (N, C, H, W) uint8, and onnxruntime's output codes for them."""

    def __init__(self, path: Path, x: NDArray[np.uint8]) -> None:
        self.path, self.x = path, x
        raw = runtime.read_model(path / "model.qdq.onnx")
        self.scale = output_scale(runtime.parse_model(raw))
        session = runtime.session(raw)
        self.codes = self.steps(runtime.run(session, runtime.adapt(x, session)))

    def steps(self, logits: NDArray[Any]) -> NDArray[np.int64]:
        """Logits in steps of the output code."""
        return np.rint(logits / self.scale).astype(np.int64)

    def compare(self, codes: NDArray[np.int64]) -> dict[str, Any]:
        """How far other output codes are apart."""
        apart = np.abs(codes - self.codes).max(axis=1)
        same = codes.argmax(axis=1) == self.codes.argmax(axis=1)
        return {
            "n_images": len(apart),
            "n_equal": int((apart == 0).sum()),
            "n_within_one_step": int((apart <= 1).sum()),
            "max_steps": int(apart.max()),
            "n_top1_equal": int(same.sum()),
        }


def inside(
    client: str, folder: Path, environments: Path, file: str, *options: str
) -> tuple[dict[str, Any], str]:
    """Run a file of the folder in a client's environment: how far its logits are, what it printed.

    Its program is called with the file, the images, where to write logits, and `options`; it may
    write into the folder that it runs in.
    """
    python = environment(client, environments)
    program = INSIDE / f"run_{client.replace('-', '_')}.py"
    with tempfile.TemporaryDirectory() as work:
        images, out = Path(work) / "x.npy", Path(work) / "y.npy"
        np.save(images, folder.x)
        command = [python, program, (folder.path / file).resolve(), images, out, *options]
        ended = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if ended.returncode:
            raise click.ClickException(f"{client} failed:\n{ended.stderr[-2000:]}")
        return folder.compare(folder.steps(np.load(out))), ended.stdout


def litert(folder: Folder, environments: Path, kernels: str) -> dict[str, Any]:
    """LiteRT on model.tflite; `kernels` is the name of an OpResolverType."""
    return inside("litert", folder, environments, "model.tflite", kernels)[0]


def tflite_micro(folder: Folder, environments: Path) -> dict[str, Any]:
    """The interpreter of TFLite Micro, with its reference kernels, on model.tflite."""
    return inside("tflite-micro", folder, environments, "model.tflite")[0]


def hls4ml(folder: Folder, environments: Path) -> dict[str, Any]:
    """The C++ model that hls4ml makes of model.qonnx.onnx, compiled for this machine."""
    return inside("hls4ml", folder, environments, "model.qonnx.onnx", "project")[0]


def finn(folder: Folder, environments: Path) -> dict[str, Any]:
    """model.qonnx.onnx behind FINN's front end, in qonnx's executor; operators by kind."""
    row, printed = inside("finn", folder, environments, "model.qonnx.onnx")
    return row | {"operators": json.loads(printed.splitlines()[-1])}


def vela(folder: Folder, environments: Path) -> dict[str, Any]:
    """Arm Vela on model.tflite: operators that run on the NPU, and on the CPU beside it."""
    python = environment("vela", environments)
    with tempfile.TemporaryDirectory() as work:
        found = subprocess.run(
            [python.with_name("vela"), folder.path / "model.tflite", "--output-dir", work,
             "--accelerator-config", "ethos-u55-128", "--verbose-performance"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        (summary,) = Path(work).glob("*summary*.csv")
        row = list(csv.DictReader(summary.open()))[-1]
    counts = {k: int(re.search(rf"{k} operators = (\d+)", found)[1]) for k in ("NPU", "CPU")}  # type: ignore[index]
    return {"npu_operators": counts["NPU"], "cpu_operators": counts["CPU"],
            "inferences_per_second": float(row["inferences_per_second"])}  # fmt: skip


def ort_format(folder: Folder, environments: Path) -> dict[str, Any]:
    """onnxruntime's own format, made by its converter; the file repeats no hash, the answers do."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
        source = folder.path / "model.qdq.onnx"
        subprocess.run(
            [*command, source, "--output_dir", work, "--optimization_style", "Fixed"],
            check=True, capture_output=True, env=os.environ | {"ORT_CONVERT_ONNX_MODELS": "1"},
        )  # fmt: skip
        (made,) = Path(work).glob("*.ort")
        (operators,) = Path(work).glob("*.config")
        session = runtime.session(made.read_bytes())
        answers = runtime.run(session, runtime.adapt(folder.x, session))
        lines = [line for line in operators.read_text().splitlines() if ";" in line]
    return folder.compare(folder.steps(answers)) | {"required_operators": lines}


CLIENTS: dict[str, Callable[[Folder, Path], dict[str, Any]]] = {
    "LiteRT, XNNPACK": lambda f, e: litert(f, e, "AUTO"),
    "LiteRT, reference kernels": lambda f, e: litert(f, e, "BUILTIN_REF"),
    "TFLite Micro": tflite_micro,
    "Arm Vela, Ethos-U55-128": vela,
    "onnxruntime, ORT format": ort_format,
    "FINN+, front end": finn,
    "hls4ml, C++": hls4ml,
}
NEEDS_SHIFTS = {"hls4ml, C++"}
"""Clients that are left out unless the profile is po2-tensor or they are asked for by name."""


def _rows(found: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    for name, row in found.items():
        if "n_images" in row:
            n = row["n_images"]
            cells = [f"{row[k]} of {n}" for k in ("n_equal", "n_within_one_step", "n_top1_equal")]
            yield [name, *cells, f"{row['max_steps']}"]
        else:
            npu, cpu = row["npu_operators"], row["cpu_operators"]
            yield [name, f"{npu} operators on the NPU, {cpu} on the CPU", "", "", ""]


@click.command()
@click.argument("export", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", "name", required=True, help="Data set, or an .npz with x and y.")
@click.option("--images", type=int, help="The first N test images. [all]")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data. [$RESQ_DATA]")
@click.option("--environments", type=click.Path(path_type=Path), required=True)
@click.option("--client", "clients", multiple=True, type=click.Choice([*CLIENTS]), help="[all]")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    export: Path,
    name: str,
    images: int | None,
    root: Path | None,
    environments: Path,
    clients: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Run clients on EXPORT and print how far their outputs are from onnxruntime's."""
    try:
        folder = Folder(export, data.load_test(name, root).first(images).x)
    except InputError as error:
        raise click.ClickException(str(error)) from None
    shifts = artifacts.read_json(export / "manifest.json")["profile"] == "po2-tensor"
    chosen = clients or [c for c in CLIENTS if shifts or c not in NEEDS_SHIFTS]
    found = {client: CLIENTS[client](folder, environments.resolve()) for client in chosen}
    headers = ["client", "equal", "within one step", "same top-1", "most steps"]
    click.echo(tabulate(list(_rows(found)), headers, tablefmt="github", disable_numparse=True))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
