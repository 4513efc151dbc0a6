"""Studies made from result files: figures, tables, the paper beside them, claims and reports."""
