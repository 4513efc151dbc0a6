"""Models of other code bases as run folders of ours."""
