"""Long trials of what must not break: kills at random moments, malformed input, hours of running. `make soak`."""
