"""The one exception for mistakes in what a user gave: a name, a path, a number, a file.

Library callers see an ordinary ValueError with its traceback; the command `moa` prints the sentence alone and exits
with 2.
"""


class UserError(ValueError):
    """A mistake in the input. The message is one sentence: what was given, what was expected, what to do."""
