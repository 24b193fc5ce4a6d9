"""The vocabulary of Yoke: frozen values that every room speaks in. Standard library only; knows no machine, socket or tensor library."""
