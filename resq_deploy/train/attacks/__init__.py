"""Methods of stage 1. A new one is one module here and one row in `ATTACKS`."""

from resq_deploy.train.attacks.adversarial import Adversarial
from resq_deploy.train.attacks.afd import AFD
from resq_deploy.train.attacks.base import Attack
from resq_deploy.train.attacks.feature_consistency import FeatureConsistency
from resq_deploy.train.attacks.trades import Trades

ATTACKS: dict[str, type[Attack]] = {
    "feature-consistency": FeatureConsistency,
    "trades": Trades,
    "adversarial": Adversarial,
    "afd": AFD,
}

__all__ = ["ATTACKS", "Attack"]
