"""Dense weights in, block weights out; one method a file."""

from .target import Method as Method
from .target import Target as Target
from .target import initialise as initialise
from .target import method_named as method_named
from .target import method_names as method_names
