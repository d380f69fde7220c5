"""Give the modules of a plan their weights: from the dense weights, or fitted to text."""

from .allocation import allocate as allocate
from .apply import filled_in as filled_in
from .apply import rewrite as rewrite
from .calibration import TokenWindows as TokenWindows
from .calibration import random_token_count as random_token_count
from .cost import Cost as Cost
from .cost import fitting_cost as fitting_cost
from .cost import speed as speed
from .layer_store import Fitted as Fitted
from .layer_store import LayerStore as LayerStore
from .layer_store import Streams as Streams
from .layerwise import fit_sequentially as fit_sequentially
