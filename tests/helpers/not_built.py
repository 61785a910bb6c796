"""Published names that are not built yet, so that every other name must be there.

The list may only get shorter: ``tests/compat/test_catalogue.py`` fails when one of them exists.
"""

MODULES = ()
NAMES = ()


def is_known(message: str) -> bool:
    """Whether a problem of check-cfg says only that one of these is missing."""
    messages = [f"there is no module {module!r}" for module in MODULES]
    messages += [f"{name!r} is not in {module!r}" for module, name in NAMES]
    return message in messages
