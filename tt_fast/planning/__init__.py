"""Planning: beam search over a model, and a planner that acts with it."""

from tt_fast.planning.base import BeamPlan, BeamSequence, ImaginedPlan, PlanBackend, PlanTrace
from tt_fast.planning.planner import Planner
from tt_fast.planning.search import beam_plan, beam_search, make_backend

__all__ = [
    "BeamPlan",
    "BeamSequence",
    "ImaginedPlan",
    "PlanBackend",
    "PlanTrace",
    "Planner",
    "beam_plan",
    "beam_search",
    "make_backend",
]
