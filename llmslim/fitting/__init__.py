"""Give the modules of a plan their weights: from the dense weights, or fitted to text."""

from .allocation import allocate as allocate
from .apply import filled_in as filled_in
from .apply import rewrite as rewrite
from .apply import steps_of as steps_of
from .calibration import TokenWindows as TokenWindows
from .calibration import random_token_count as random_token_count
from .cost import Cost as Cost
from .cost import fit_for_training as fit_for_training
from .cost import fitting_cost as fitting_cost
from .cost import free_memory as free_memory
from .cost import speed as speed
from .descent import steps_done as steps_done
from .end_to_end import train_end_to_end as train_end_to_end
from .layer_store import DenseStates as DenseStates
from .layer_store import Fitted as Fitted
from .layer_store import LayerStore as LayerStore
from .layer_store import Streams as Streams
from .layerwise import fit_sequentially as fit_sequentially
