"""Inference: sessions, the scheduler that chooses each step's batch, the stages that compute it, and the engine that drives them."""
