"""Distil a student from a teacher: divergences, losses in chunks, live and stored teachers, the trainer."""

from burnish.distill.divergence import LOSSES, forward_kl, jensen_shannon, reverse_kl
from burnish.distill.teacher import LiveTeacher, StoredTeacher
from burnish.distill.train import DistillResult, distill
from burnish.distill.trainer import DistillTrainer, Objective
from burnish.doors import make_callable
from burnish.training.chunked import chunked_loss

__all__ = [
    "LOSSES",
    "DistillResult",
    "DistillTrainer",
    "LiveTeacher",
    "Objective",
    "StoredTeacher",
    "chunked_loss",
    "distill",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
]

make_callable(__name__)
