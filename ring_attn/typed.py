"""`typed`: arguments of the wrong type raise TypeError where they enter, naming the argument and what it should be."""

from __future__ import annotations

from numbers import Integral

from beartype import BeartypeConf, beartype

typed = beartype(conf=BeartypeConf(violation_param_type=TypeError, is_pep484_tower=True))  # an int is a float


def whole(name: str, value: object) -> int:
    """`value`, an int or an integer scalar of another library, as a Python int; ValueError where it is something else."""
    number = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{name} takes whole numbers, got {value!r}")
    return number


def counts(value: object) -> bool:
    """Whether value is a whole number of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def is_jitted(x: object) -> bool:
    """Whether x is what @triton.jit makes of a function, compiled or interpreted; Triton is not imported for it."""
    return type(x).__module__.partition(".")[0] == "triton" and hasattr(x, "fn")
