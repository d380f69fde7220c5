"""Objectives of healing, one per file; files of helpers begin with `_`."""

from llmslim.plugins import Objective as Objective

from ._step import Step as Step
from ._step import TeacherTopK as TeacherTopK
from ._step import next_tokens as next_tokens
from ._step import objective_named as objective_named
