"""`typed`: arguments of the wrong type raise TypeError where they enter, naming the argument and what it should be."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

typed = beartype(conf=BeartypeConf(violation_param_type=TypeError))


def is_jitted(x: object) -> bool:
    """Whether x is what @triton.jit makes of a function, compiled or interpreted; Triton is not imported for it."""
    return type(x).__module__.partition(".")[0] == "triton" and hasattr(x, "fn")
