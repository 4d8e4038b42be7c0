"""Supervised fine-tuning, with gradients or with forward passes only."""

from burnish.doors import make_callable
from burnish.tune.replay import ReplayResult, replay
from burnish.tune.train import TuneResult, tune
from burnish.tune.trainer import TuneTrainer, ZerothOrderTrainer

__all__ = ["ReplayResult", "TuneResult", "TuneTrainer", "ZerothOrderTrainer", "replay", "tune"]

make_callable(__name__)
