"""Budgets: operator and blocks chosen from measured costs."""

from replfx.budget.choose import Chosen, choose

__all__ = ["Chosen", "choose"]
