"""What is made from result files: figures, tables, comparisons with the paper, claims and reports."""
