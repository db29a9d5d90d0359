"""Attacks: what somebody else may have written."""
