"""HTTP in, events out: the OpenAI-compatible dialect. Speaks only to a :class:`yoke.core.request.Cluster`; knows no node, engine or backend."""
