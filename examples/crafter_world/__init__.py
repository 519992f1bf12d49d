"""Seeded walks through Crafter, a top-down world of tiles: a seed gives one world and one walk through it.

`game` is the world, `walkers` choose the actions, `settings` are what may be asked for, and `recording` plays a walk.
"""
