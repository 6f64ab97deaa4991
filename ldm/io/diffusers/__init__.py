"""Models in the form of diffusers: one folder for each part, with its own names of weights and its own configuration.

Each module translates one part in both directions: its configuration with `ours` and `theirs`, its weights with the
table of layers that `layers` returns.
"""
