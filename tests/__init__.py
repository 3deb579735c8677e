"""Tests of the package; `tests.model` is the plain model, `tests.kernel` asks the running kernel."""
