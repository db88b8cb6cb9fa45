"""The device page, the store and the bus: what replaces XenStore."""
