"""Result rows, sums per document, statistics and curves: plain numbers, no model and no torch."""
