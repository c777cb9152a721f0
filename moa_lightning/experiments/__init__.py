"""Ablation grids: read a grid file, run it, compare the variants seed by seed, draw the convergence.

The parts know each other in one direction only: `grid` (what shall run) -> `state` (what has run) -> `worker`,
`progress`, `runner` (running it) and `statistics` -> `table`, `plots` (reading it back); `command` is `moa ablate`.
Nothing here imports torch, so that the command answers at once.
"""
