"""What a run tells at its end."""
