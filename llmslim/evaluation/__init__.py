"""How good a model is: on text, beside the dense model, and on tasks."""

from llmslim.report.scores import Estimate as Estimate
from llmslim.report.scores import Evaluation as Evaluation
from llmslim.report.scores import TaskScore as TaskScore
from llmslim.report.scores import TextScores as TextScores
from llmslim.report.scores import keep_evaluation as keep_evaluation
from llmslim.report.scores import read_evaluation as read_evaluation

from .tasks import check_tasks as check_tasks
from .tasks import score_task as score_task
from .texts import score_text as score_text
