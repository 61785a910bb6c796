"""The doctor: examines a whole dataset row by row and says what is wrong with it, and where.

``reading`` gives raw rows with their ``file:line``, ``layouts`` knows the fields of each format,
``checks`` are the small functions that find mistakes, ``kinds`` says what each mistake means,
``scan`` puts them together, ``report`` and ``page`` show the result.
"""
