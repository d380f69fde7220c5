"""Train a slim model to recover its quality; `objectives` has one file per objective."""

from .healing_dir import HealingDir as HealingDir
from .healing_dir import folder_beside as folder_beside
from .inputs import HealInputs as HealInputs
from .inputs import load_inputs as load_inputs
from .objectives import objective_named as objective_named
from .report import Answer as Answer
from .report import HealReport as HealReport
from .run import heal_model as heal_model
