"""From a model, machines and links to a plan, by prediction. Pure: the same measurements give the same plan."""

from yoke.planner.cost import COSTS, CostModel, Machine, StageTime, first_token_s, seconds_per_token, seconds_per_token_together
from yoke.planner.layout import grid_plan
from yoke.planner.moving import moved_bytes, moving_s
from yoke.planner.outlook import Alternative, Outlook
from yoke.planner.search import make_plan
from yoke.planner.wish import Goal, StageWish, Wish

__all__ = [
    "COSTS",
    "Alternative",
    "CostModel",
    "Goal",
    "Machine",
    "Outlook",
    "StageTime",
    "StageWish",
    "Wish",
    "first_token_s",
    "grid_plan",
    "make_plan",
    "moved_bytes",
    "moving_s",
    "seconds_per_token",
    "seconds_per_token_together",
]
