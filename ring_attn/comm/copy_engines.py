"""Which transport a ring over GPUs gets: copy engines where its exchange could use them and the GPUs allow it."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ring_attn.comm.nodes import NodesTransport
from ring_attn.comm.process_group import ProcessGroupTransport, own_part
from ring_attn.comm.symmetric import SymmetricTransport

logger = logging.getLogger("ring_attn")

_nodes: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def with_copy_engines(messages: ProcessGroupTransport, exchange: str) -> ProcessGroupTransport:
    """Copy engines in place of messages: for all pulls on GPUs of one host, and inside nodes where hosts have several ranks.

    All processes must call this. Raises ValueError where "pull" was asked for by name on GPUs of one host that do not allow it.
    """
    on_one_host = messages.link == "gpus" and exchange in ("auto", "pull") and messages.num_processes > 1
    in_nodes = messages.link == "network" and exchange in ("auto", "two-level") and messages.ranks_per_node > 1
    if messages.ranks_per_process > 1 or not (on_one_host or in_nodes):
        return messages
    try:
        if on_one_host:
            return SymmetricTransport(messages.group, among=messages.among)
        among = f" in node {messages.process // messages.ranks_per_node}{messages.among}"
        return NodesTransport(messages.group, SymmetricTransport(_node(messages), among=among), among=messages.among)
    except ValueError as reason:
        if exchange == "pull":
            raise ValueError(
                f"{reason}; or pull by messages, Ring(ProcessGroupTransport(group), exchange='pull'), or take exchange='auto', "
                f"which then does"
            ) from None
        logger.info("exchange: pulls go by messages, not by copy engines: %s", reason)
        return messages


def _node(messages: ProcessGroupTransport) -> dist.ProcessGroup:
    """The group of this process's node; made once for a group, by all its processes together."""
    found = _nodes.get(messages.group)
    if found is None:
        count = messages.ranks_per_node
        nodes = [range(start, start + count) for start in range(0, messages.num_processes, count)]
        found = _nodes[messages.group] = own_part(messages.group, nodes)
    return found
