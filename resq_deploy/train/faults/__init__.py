"""Methods of stage 2. A new one is one module here and one row in `FAULTS`."""

from resq_deploy.train.faults.advbet import AdvBET
from resq_deploy.train.faults.clip import Clip
from resq_deploy.train.faults.k_upset import KUpset
from resq_deploy.train.faults.randbet import RandBET
from resq_deploy.train.faults.wcat import WCAT

FAULTS: dict[str, type[Clip]] = {
    "randbet": RandBET,
    "advbet": AdvBET,
    "k-upset": KUpset,
    "wcat": WCAT,
    "clip": Clip,
}

__all__ = ["FAULTS", "Clip"]
