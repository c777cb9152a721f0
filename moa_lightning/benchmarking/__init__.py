"""`moa bench`: what swapping the activation costs on this machine, from one operation to a training step, and whether
the data keep up. docs/bench.md says what is measured and how."""
