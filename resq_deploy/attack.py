"""White-box attacks on the Brevitas twin, replayed on the exported file.

The twin is the checkpoint that the file was exported from. Adversarial images are made with
its gradients, as uint8 pixels; parity makes the transfer exact up to rounding, and both
counts are reported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import artifacts, evaluate, runtime
from resq_deploy.data.base import Dataset
from resq_deploy.errors import InputError
from resq_deploy.metrics import top1
from resq_deploy.nets import checkpoint


def _counts(correct: NDArray[np.bool_]) -> dict[str, int]:
    return {"n_correct": int(correct.sum()), "n_total": len(correct)}


def marks(correct: NDArray[np.bool_]) -> str:
    """One character per image, in order: what paired intervals need."""
    return "".join("01"[int(c)] for c in correct)


def attack(
    model: Path,
    twin: Path,
    data: Dataset,
    *,
    epsilons: tuple[float, ...],
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """PGD at every epsilon (pixels in [0, 1]); returns, and writes to `out`, the counts.

    An existing `out` made from the same inputs is returned as it is. Raises InputError when
    `model` or `twin` cannot be read or an epsilon lies outside of [0, 1].
    """
    for epsilon in epsilons:
        if not 0 <= epsilon <= 1:
            raise InputError(f"epsilon must lie in [0, 1] (8/255 is 0.0314), got {epsilon}")
    raw = runtime.read_model(model)
    net, _ = checkpoint.load(twin)
    inputs = {
        "model_sha256": artifacts.sha256(model),
        "twin_sha256": artifacts.sha256(twin),
        "data_sha256": data.sha256,
        "epsilons": list(epsilons),
        "steps": steps,
        "restarts": restarts,
        "seed": seed,
    }
    if out is not None and out.is_file():
        done = artifacts.read_json(out)
        if all(done.get(key) == value for key, value in inputs.items() if key != "epsilons") and (
            [row["epsilon"] for row in done.get("epsilons", [])] == list(epsilons)
        ):
            return dict(done)
    session = runtime.session(raw, threads=0)

    def both(x: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        deployed = top1(runtime.run(session, runtime.adapt(x, session))) == data.y
        return evaluate.logits(net, x).argmax(1).numpy() == data.y, deployed

    clean_twin, clean = both(data.x)
    rows = []
    for epsilon in epsilons:
        images = evaluate.adversarial(
            net, data, epsilon=epsilon, steps=steps, restarts=restarts, seed=seed,
            what=f"PGD-{steps} at {epsilon * 255:g}/255",
        )  # fmt: skip
        on_twin, deployed = both(images)
        rows.append(
            {
                "epsilon": epsilon,
                "twin": _counts(on_twin),
                "deployed": _counts(deployed),
                "correct": marks(deployed),
            }
        )
    result = inputs | {
        "n_total": len(data),
        "clean": {"twin": _counts(clean_twin), "deployed": _counts(clean)},
        "clean_correct": marks(clean),
        "epsilons": rows,
        "versions": artifacts.versions(),
    }
    if out is not None:
        artifacts.write_json(out, result)
    return result
