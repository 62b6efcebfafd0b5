"""`ldmseg evaluate`: a model on a split -> panoptic quality, result files, pictures."""

from ldmseg_fast.evaluation.options import EvaluationOptions, resolve_thresholds
from ldmseg_fast.evaluation.run import evaluate
from ldmseg_fast.evaluation.scores import OBJECT, in_percent
from ldmseg_fast.evaluation.table import format_report

__all__ = ["OBJECT", "EvaluationOptions", "evaluate", "format_report", "in_percent", "resolve_thresholds"]
