"""What a run will need, found out before any weight is loaded."""
