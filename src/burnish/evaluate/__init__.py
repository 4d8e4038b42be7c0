"""Quality, size, memory and speed of models: one alone, or before against after under one setting."""

from burnish.doors import make_callable
from burnish.evaluate.compare import evaluate
from burnish.evaluate.divergence import forward_kl, top1_agreement
from burnish.evaluate.estimate import Estimate, mean_per_token
from burnish.evaluate.measure import Speed
from burnish.evaluate.perplexity import negative_log_likelihood, perplexity
from burnish.evaluate.result import Comparison, EvaluateResult, Row

__all__ = [
    "Comparison",
    "Estimate",
    "EvaluateResult",
    "Row",
    "Speed",
    "evaluate",
    "forward_kl",
    "mean_per_token",
    "negative_log_likelihood",
    "perplexity",
    "top1_agreement",
]

make_callable(__name__)
