"""Images and labels: one image reader, one class order, one interface to folders, tars and data sets."""
