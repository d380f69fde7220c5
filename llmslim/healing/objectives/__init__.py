"""What training makes smaller; one objective a file, `_` before the names of helpers."""

from llmslim.plugins import Objective as Objective

from ._step import Step as Step
from ._step import TeacherTopK as TeacherTopK
from ._step import objective_named as objective_named
from ._step import objective_names as objective_names
