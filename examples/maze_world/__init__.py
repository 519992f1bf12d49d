"""Seeded first-person mazes drawn by ViZDoom: a seed gives one maze, its look and one walk through it.

`layout` plans the maze, `looks` holds its textures, `level` writes it as a map file, `walker` chooses the actions, and
`recording` plays the map in the engine.
"""
