"""Public test tools: tiny models, virtual time, fault injection and conformance suites. Knows every room; no room knows it."""
