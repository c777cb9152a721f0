"""The tests mirror the packages; tests/reference.py is the independent yardstick of the feed-forward family."""
