"""What is inside a dataset: figures, a page of text, a picture."""
