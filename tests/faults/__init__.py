"""Faults: what is damaged, cut, odd or full."""
