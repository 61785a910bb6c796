"""What a run will need, known before it: memory of each GPU, steps, time and disk.

``plan.plan(document, machine)`` reads a config, builds its model without weights on torch's meta
device and adds up the bytes; ``remedies.remedies`` finds the changes with which a run fits.
"""
