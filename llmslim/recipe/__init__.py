"""Recipes: what the user wrote, checked. No torch here."""

from .load import json_schema as json_schema
from .load import recipe_yaml as recipe_yaml
from .load import shipped_recipes as shipped_recipes
from .match import close_names as close_names
from .match import first_rule as first_rule
from .match import rules_by_name as rules_by_name
from .roles import ROLES as ROLES
from .rule import Rule as Rule
from .schema import Calibration as Calibration
from .schema import EndToEnd as EndToEnd
from .schema import Heal as Heal
from .schema import HealSource as HealSource
from .schema import Recipe as Recipe
from .schema import Refine as Refine
