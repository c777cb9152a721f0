"""What a run would need, without its devices and without its data: `moa plan`.

`devices` knows kinds of devices, `settings` reads the configuration of a fit, `fake` executes the fit on tensors without
content, `tracker` counts what that execution would hold and send, `estimate` turns it into a plan, `command` prints it.
"""
