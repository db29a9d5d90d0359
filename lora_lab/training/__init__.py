"""The one training loop, its members, and everything that makes it exact and resumable."""
