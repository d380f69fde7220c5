"""What becomes of every module of a model: the plan, the ledger, and carrying it out."""

from llmslim.progress import Progress as Progress
from llmslim.progress import quietly as quietly

from .allocation import allocate as allocate
from .blocks import fill_site as fill_site
from .blocks import seed_of as seed_of
from .cost import Cost as Cost
from .cost import fitting_cost as fitting_cost
from .cost import speed as speed
from .finalise import finalise as finalise
from .plan import Plan as Plan
from .plan import model_on_meta as model_on_meta
from .plan import plan as plan
from .report import Report as Report
from .report import Row as Row
from .report import Totals as Totals
from .rewrite import Calibration as Calibration
from .rewrite import filled_in as filled_in
from .rewrite import rewrite as rewrite
from .scrambled import scrambled_tokens as scrambled_tokens
from .sequential import fit_sequentially as fit_sequentially
from .visits import Fitted as Fitted
from .visits import Streams as Streams
from .visits import Visits as Visits
from .width import resize_mlp as resize_mlp
