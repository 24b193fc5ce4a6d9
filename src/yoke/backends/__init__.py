"""Libraries that compute, behind one narrow protocol. A backend knows tensors and devices; it does not know nodes, plans or sockets."""
