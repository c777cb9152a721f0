"""For all tests: Ctrl-C reaches the processes that they start.

A shell that runs a job in the background has it ignore SIGINT, and children inherit that; the tests that interrupt a
command would then wait for one that cannot be interrupted.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
