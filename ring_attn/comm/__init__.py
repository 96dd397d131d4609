"""Wires: they move shards between ranks and know no attention."""
