"""How good a model is: on text, beside the dense model, and on tasks."""

from .scores import Estimate as Estimate
from .scores import Evaluation as Evaluation
from .scores import TaskScore as TaskScore
from .scores import TextScores as TextScores
from .scores import keep_evaluation as keep_evaluation
from .scores import read_evaluation as read_evaluation
from .tasks import check_tasks as check_tasks
from .tasks import score_task as score_task
from .texts import score_text as score_text
