"""What becomes of every module of a model: made of names and shapes, without a weight."""

from .planner import model_on_meta as model_on_meta
from .planner import plan as plan
