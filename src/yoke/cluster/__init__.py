"""Membership and agreement on the plan: what happened in, what to do out. Pure: time is an argument, and nothing here reaches a network, a clock or a disk."""
