"""Train a slim model until it is of use again; one objective a file in `objectives`."""

from .objectives import objective_named as objective_named
from .objectives import objective_names as objective_names
from .report import Answer as Answer
from .report import HealReport as HealReport
from .run import Place as Place
from .run import heal_model as heal_model
from .slim_folder import SlimFolder as SlimFolder
from .slim_folder import read_slim_folder as read_slim_folder
from .rundir import working_folder as working_folder
