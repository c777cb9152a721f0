"""The one exception for mistakes in what a user gave: a name, a path, a number, a file.

Library callers see an ordinary ValueError with its traceback; the command `moa` prints the sentence alone and exits
with `exit_code`.
"""


class UserError(ValueError):
    """A mistake in the input. The message is one sentence: what was given, what was expected, what to do."""

    exit_code = 2


class Diverged(UserError):
    """A training that came to nothing because its numbers are not finite; a grid counts it as a result."""

    exit_code = 3
