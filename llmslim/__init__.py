"""llmslim: make a language model smaller by giving its projections structure.

    from llmslim import slim
    report = slim(model, "mlp-half")

Everything here is imported on first use: `import llmslim` itself loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmslim._autoregister import register_when_imported
from llmslim._version import __version__ as __version__

if TYPE_CHECKING:
    from llmslim.anatomy.lora import lora_config as lora_config
    from llmslim.api import Conversion as Conversion
    from llmslim.api import bench as bench
    from llmslim.api import convert as convert
    from llmslim.api import evaluate as evaluate
    from llmslim.api import export_dense as export_dense
    from llmslim.api import export_gguf as export_gguf
    from llmslim.api import export_onnx as export_onnx
    from llmslim.api import heal as heal
    from llmslim.api import load as load
    from llmslim.api import plan as plan
    from llmslim.api import plan_heal as plan_heal
    from llmslim.api import push as push
    from llmslim.api import save as save
    from llmslim.api import slim as slim
    from llmslim.api import verify as verify
    from llmslim.data import Windows as Windows
    from llmslim.editing.plans import Plan as Plan
    from llmslim.editing.quantised import quantize_blocks as quantize_blocks
    from llmslim.errors import CheckpointError as CheckpointError
    from llmslim.errors import DataError as DataError
    from llmslim.errors import HealingError as HealingError
    from llmslim.errors import PluginError as PluginError
    from llmslim.errors import RecipeError as RecipeError
    from llmslim.errors import SizeError as SizeError
    from llmslim.errors import SlimError as SlimError
    from llmslim.errors import TargetError as TargetError
    from llmslim.errors import UnfinishedError as UnfinishedError
    from llmslim.evaluation import Estimate as Estimate
    from llmslim.evaluation import Evaluation as Evaluation
    from llmslim.evaluation import TaskScore as TaskScore
    from llmslim.evaluation import TextScores as TextScores
    from llmslim.healing.plan import HealingPlan as HealingPlan
    from llmslim.healing.report import HealReport as HealReport
    from llmslim.modeling.grouped_pointwise import GroupedPointwise as GroupedPointwise
    from llmslim.modeling.low_rank import LowRank as LowRank
    from llmslim.modeling.structured import Products as Products
    from llmslim.modeling.structured import StructuredLinear as StructuredLinear
    from llmslim.options import BenchOptions as BenchOptions
    from llmslim.options import ConvertOptions as ConvertOptions
    from llmslim.options import EvalOptions as EvalOptions
    from llmslim.options import HealOptions as HealOptions
    from llmslim.plugins import register_init as register_init
    from llmslim.plugins import register_objective as register_objective
    from llmslim.plugins import register_structure as register_structure
    from llmslim.recipe import Heal as Heal
    from llmslim.recipe import Recipe as Recipe
    from llmslim.report.report import Report as Report
    from llmslim.report.report import Row as Row
    from llmslim.report.report import Totals as Totals
    from llmslim.report.speeds import Benchmark as Benchmark
    from llmslim.report.speeds import Speed as Speed
    from llmslim.storage import Verification as Verification

_EXPORTS = {
    "llmslim.api": "Conversion bench convert evaluate export_dense export_gguf export_onnx heal "
    "load plan plan_heal push save slim verify",
    "llmslim.data": "Windows",
    "llmslim.editing.plans": "Plan",
    "llmslim.editing.quantised": "quantize_blocks",
    "llmslim.errors": "CheckpointError DataError HealingError PluginError RecipeError SizeError "
    "SlimError TargetError UnfinishedError",
    "llmslim.evaluation": "Estimate Evaluation TaskScore TextScores",
    "llmslim.anatomy.lora": "lora_config",
    "llmslim.healing.plan": "HealingPlan",
    "llmslim.healing.report": "HealReport",
    "llmslim.modeling.grouped_pointwise": "GroupedPointwise",
    "llmslim.modeling.low_rank": "LowRank",
    "llmslim.modeling.structured": "Products StructuredLinear",
    "llmslim.options": "BenchOptions ConvertOptions EvalOptions HealOptions",
    "llmslim.plugins": "register_init register_objective register_structure",
    "llmslim.recipe": "Heal Recipe",
    "llmslim.report.report": "Report Row Totals",
    "llmslim.report.speeds": "Benchmark Speed",
    "llmslim.storage": "Verification",
}
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register_when_imported()
