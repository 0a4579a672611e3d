"""Every exception regauge raises, and every exit code of the command line.

::

    RegaugeError
      ├─ BadInput        (exit 2)  a file, option, recipe or model that cannot be used as it is
      │    ├─ CheckpointError   a damaged, missing or unsafe checkpoint file
      │    ├─ RecipeError       an unknown move, an unknown key, a bad value
      │    └─ TraceError        torch.export could not trace the model
      ├─ Refused         (exit 3)  the symmetry asked for does not exist here
      └─ NotEquivalent   (exit 1)  a certificate failed; nothing was kept

A message says what was expected, what was found, and one way out.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_CERTIFICATE = 1
EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3
EXIT_UNDECIDED = 4


class RegaugeError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        message: what went wrong, in one sentence.
        node: operation of the traced graph concerned, if any.
        parameter: state-dict name concerned, if any.
        space: label of the space concerned, if any.
        expected: what would have been right.
        found: what was there instead.
        way_out: one thing the user can do.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        parameter: str | None = None,
        space: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        way_out: str | None = None,
    ) -> None:
        self.message = message
        self.node = node
        self.parameter = parameter
        self.space = space
        self.expected = expected
        self.found = found
        self.way_out = way_out
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.message]
        for label in ("node", "parameter", "space", "expected", "found"):
            value = getattr(self, label)
            if value is not None:
                parts.append(f"{label}: {value}")
        if self.way_out is not None:
            parts.append(f"try: {self.way_out}")
        return "\n  ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__)

    def to_dict(self) -> dict[str, str | None]:
        """The error as plain data, for ``--json``."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "node": self.node,
            "parameter": self.parameter,
            "space": self.space,
            "expected": self.expected,
            "found": self.found,
            "way_out": self.way_out,
        }


def _rebuild(cls: type[RegaugeError], state: dict[str, object]) -> RegaugeError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    Exception.__init__(error, str(error))
    return error


class BadInput(RegaugeError):
    """The input cannot be used: wrong option, missing file, unusable model."""


class CheckpointError(BadInput):
    """A checkpoint file is missing, truncated, inconsistent, unsafe, or holds bad values."""


class RecipeError(BadInput):
    """A recipe or ``--move`` names something unknown, or gives a value of the wrong kind."""


class TraceError(BadInput):
    """``torch.export`` could not trace the model; the exporter's reason is in ``found``."""


class Refused(RegaugeError):
    """The symmetry asked for does not exist in this model, or the result cannot be stored.

    ``node`` names the limiting operation; ``found`` says in plain words why it limits.
    """

    exit_code = EXIT_REFUSED


class NotEquivalent(RegaugeError):
    """A certificate failed: the rewritten model is not the same function. Nothing was kept."""

    exit_code = EXIT_CERTIFICATE
