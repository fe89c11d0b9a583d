"""The one error a user is meant to read.

A `SitfastError` names the value, the rule it breaks and the remedy. Every command prints it as `error: …` and exits with
status 2 (see `sitfast.cli.run`); as a library, it is an ordinary `ValueError`.
"""


class SitfastError(ValueError):
    """Something the user gave cannot work; the message says what, why and what would."""
