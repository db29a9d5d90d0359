"""Clients train over the served base by the Tinker API: they own loop, losses and data, the server owns weights and passes."""
