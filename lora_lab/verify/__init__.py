"""What a merged checkpoint or an export must show before it is kept."""
