"""Models written as single-device code; the only part that meets the ring is RingSelfAttention."""
