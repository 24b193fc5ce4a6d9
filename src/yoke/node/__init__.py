"""One machine's process: settings, workers, wiring, and the cluster that they make. The only place where parts are put together."""
