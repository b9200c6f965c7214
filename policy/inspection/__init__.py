"""The content of a dataset as figures, as a page of text and as a picture."""
