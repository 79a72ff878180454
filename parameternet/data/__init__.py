"""Images and labels: one image reader, one order of classes, one interface to folders, tars and data sets."""
