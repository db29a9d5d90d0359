"""Adapter methods: one file each."""
