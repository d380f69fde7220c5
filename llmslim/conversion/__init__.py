"""From a model and a recipe to a checkpoint: in memory, or piece by piece."""

from .calibrate import asked_for as asked_for
from .calibrate import calibration_spec as calibration_spec
from .calibrate import token_ids as token_ids
from .calibrate import try_text as try_text
from .convert import convert as convert
from .device import device_named as device_named
from .options import Conversion as Conversion
from .options import RecipeLike as RecipeLike
