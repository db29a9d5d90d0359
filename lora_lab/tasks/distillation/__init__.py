"""Distillation: a student of conversations learns what a teacher says of them."""
