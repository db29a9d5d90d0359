"""Exact accelerations. Each stands behind the plain modules that it replaces, is proved on them before it is used, and can be
switched off (`speed`).

`apply.py` decides what is used, `modules.py` holds what then stands in for modules, and tasks go through `forward.py`, which knows
what was decided. `isolation.py` proves that rows may share a pass. The other files hold one acceleration each.
All compute what the plain modules compute, up to rounding; only adapters learn, so nothing here has a gradient for a base
weight.
"""
