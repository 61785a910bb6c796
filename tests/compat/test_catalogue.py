"""Every name of the catalogue passes check-cfg without an error."""

from xtuner import configs
from xtuner.config.check import ERROR, check


def test_every_name_passes():
    errors = [
        f"{name}: {problem.code} {problem.message}"
        for name in configs.names()
        for problem in check(name)
        if problem.severity == ERROR
    ]
    assert not errors, "\n".join(errors)
