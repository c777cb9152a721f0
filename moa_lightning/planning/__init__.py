"""What a run would need, without its devices and without its data: `moa plan`.

`settings` reads the configuration of a fit, `fake` executes a step of it on tensors without content, `tracker` counts
what that would hold and send, `devices` knows kinds of devices, `estimate` makes a plan of it all, `command` prints it.
"""
