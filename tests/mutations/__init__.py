"""Small changes to the package, each of which some test must notice; run by scripts/mutate."""

from __future__ import annotations

from . import (
    conversion,
    elsewhere,
    fitting,
    front,
    healing,
    init,
    models,
    planning,
    recipes,
    reports,
    storage,
    text,
)
from ._mutation import Mutation as Mutation
from ._mutation import stale as stale

MUTATIONS = tuple(
    mutation
    for part in (
        *(models, planning, init, fitting, storage, conversion, text, healing),
        *(recipes, reports, front, elsewhere),
    )
    for mutation in part.MUTATIONS
)
