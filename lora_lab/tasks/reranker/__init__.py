"""A score for a query and a document, to put found documents in order."""
