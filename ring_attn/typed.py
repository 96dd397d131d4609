"""`typed`: arguments of the wrong type raise TypeError where they enter, naming the argument and what it should be."""

from beartype import BeartypeConf, beartype

typed = beartype(conf=BeartypeConf(violation_param_type=TypeError))
