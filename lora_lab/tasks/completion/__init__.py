"""Language modelling of plain text, in blocks."""
