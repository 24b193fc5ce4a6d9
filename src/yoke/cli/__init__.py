"""The terminal: argv in, exit code out. Builds a cluster of this machine, asks it, and prints."""
