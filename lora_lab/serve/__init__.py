"""One base and many adapters over HTTP."""
