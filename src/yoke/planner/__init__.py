"""From a model, machines and links to a plan, by prediction. Pure: the same measurements give the same plan."""

from yoke.planner.cost import Machine, Outlook, Wish, seconds_per_token
from yoke.planner.layout import grid_plan
from yoke.planner.search import make_plan

__all__ = ["Machine", "Outlook", "Wish", "grid_plan", "make_plan", "seconds_per_token"]
