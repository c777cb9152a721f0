"""The separations fixed ⊊ LA ⊊ MoA as something to run: exact witnesses, best fits at growing width, bounds.

docs/theory.md says what is shown here, what is only evidence, and who says it: [P] the abstract of arXiv 2605.26647,
[S] second-hand readings of its body, [O] ours.
"""
