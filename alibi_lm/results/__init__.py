"""Result rows, sums per document, statistics and curves: plain numbers, without models or torch."""
