"""Quality, tasks, size, memory and speed of models: one alone, or before against after under one setting."""

from burnish.doors import make_callable
from burnish.evaluate.card import update_card
from burnish.evaluate.compare import evaluate
from burnish.evaluate.divergence import forward_kl, top1_agreement
from burnish.evaluate.estimate import Estimate, jackknife, mean_per_token
from burnish.evaluate.measure import Speed
from burnish.evaluate.perplexity import negative_log_likelihood, perplexity
from burnish.evaluate.result import Comparison, EvaluateResult, Row
from burnish.evaluate.tasks import TaskResult

__all__ = [
    "Comparison",
    "Estimate",
    "EvaluateResult",
    "Row",
    "Speed",
    "TaskResult",
    "evaluate",
    "forward_kl",
    "jackknife",
    "mean_per_token",
    "negative_log_likelihood",
    "perplexity",
    "top1_agreement",
    "update_card",
]

make_callable(__name__)
