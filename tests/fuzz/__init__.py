"""Fuzzing the readers of dumps."""
