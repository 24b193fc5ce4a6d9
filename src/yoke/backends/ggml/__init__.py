"""ggml, driven by ctypes: its kernels on every device that the installed build offers. No C of our own."""
