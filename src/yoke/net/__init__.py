"""Bytes between machines: the wire format, channels that carry it, who is at the other end, and collectives over channels. Knows no model."""
