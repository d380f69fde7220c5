"""Dense weights in, block weights out; one method a file, `_` before the names of their helpers."""

from llmslim.plugins import Method as Method

from ._channel_order import learn_order as learn_order
from ._channel_order import learn_outputs as learn_outputs
from ._closed_forms import low_rank_factors as low_rank_factors
from ._gram import GramAccumulator as GramAccumulator
from ._gram import damping as damping
from ._gram import equivalent_target as equivalent_target
from ._gram import output_power as output_power
from ._gram import relative_error as relative_error
from ._gram import stable_cholesky as stable_cholesky
from ._gram import wide as wide
from .least_squares import fit_sizes as fit_sizes
from .target import Target as Target
from .target import initialise as initialise
from .target import method_named as method_named
from .target import method_names as method_names
