"""Small changes to the package, each of which some test must notice; run by scripts/mutate."""

from __future__ import annotations

from . import conversion, fitting, front, healing, models, planning, storage, text
from ._mutation import Mutation as Mutation
from ._mutation import stale as stale

MUTATIONS = tuple(
    mutation
    for part in (models, planning, fitting, storage, conversion, text, healing, front)
    for mutation in part.MUTATIONS
)
