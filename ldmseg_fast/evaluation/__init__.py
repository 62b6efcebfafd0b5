"""Evaluates a model on a split: panoptic quality, result files, pictures; what `ldmseg evaluate` runs.

`run` makes one evaluation: `predictors` make maps, `store` keeps them, `scores` count them, with `categories` by vote,
`gallery` shows the worst, `agreement` compares a backend with torch, `spread` combines seeds, `table` prints.
"""

from ldmseg_fast.evaluation.options import EvaluationOptions, resolve_thresholds
from ldmseg_fast.evaluation.run import evaluate
from ldmseg_fast.evaluation.scores import OBJECT, in_percent
from ldmseg_fast.evaluation.table import format_report

__all__ = ["OBJECT", "EvaluationOptions", "evaluate", "format_report", "in_percent", "resolve_thresholds"]
