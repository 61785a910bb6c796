"""Validation on a part of the training rows, to be switched on."""

# val_size = 0.05  # keep a share of the rows (or a number of them) to validate with
