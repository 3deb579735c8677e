"""A plain, slow second opinion on KSM: `ModelMachine` speaks the machine's interface and follows the written rules."""

from tests.model.machine import ModelMachine, ModelProcess

__all__ = ["ModelMachine", "ModelProcess"]
