"""The choice of a device, under the name this room first gave it."""

from pixcell_core.models.devices import choose_device

__all__ = ["choose_device"]
