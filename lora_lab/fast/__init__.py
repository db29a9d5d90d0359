"""Exact accelerations. Each stands behind the plain modules that it replaces, is proved on them before it is used, and can be
switched off (`speed`).

`apply.py` decides what is used, `modules.py` holds what then stands in for modules, the other files one acceleration each.
All compute what the plain modules compute, up to rounding; only adapters learn, so nothing here has a gradient for a base
weight.
"""
