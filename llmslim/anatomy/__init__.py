"""What a model is and computes, read off without its weights."""

from .dry_run import CannotRunError as CannotRunError
from .dry_run import layer_operations as layer_operations
from .likeness import changed_attributes as changed_attributes
from .likeness import differences as differences
from .likeness import first_difference as first_difference
from .precision import bf16_is_fast as bf16_is_fast
