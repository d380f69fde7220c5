"""What becomes of every module of a model: made of names and shapes, without a weight."""

from .plan import model_on_meta as model_on_meta
from .plan import plan as plan
