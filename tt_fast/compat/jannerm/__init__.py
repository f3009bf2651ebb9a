"""The original's planner by its own names and signatures (jannerm/trajectory-transformer).

    from tt_fast.compat.jannerm import beam_plan, make_prefix, extract_actions, update_context

in place of `from trajectory.search import ...` is all that scripts/plan.py needs. Or leave it as it
is: `python -m tt_fast.compat.jannerm scripts/plan.py --dataset ...`.
"""

from tt_fast.compat.jannerm.search import (
    beam_plan,
    beam_search,
    extract_actions,
    make_prefix,
    update_context,
)

__all__ = ["beam_plan", "beam_search", "extract_actions", "make_prefix", "update_context"]
