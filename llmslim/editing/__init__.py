"""Change the modules of a model as a plan says."""

from .blocks import draw_blocks as draw_blocks
from .blocks import fill_site as fill_site
from .blocks import seed_of as seed_of
from .finalise import finalise as finalise
from .plans import Plan as Plan
from .resize import resize_mlp as resize_mlp
