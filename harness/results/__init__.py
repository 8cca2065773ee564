"""The files of one run, and the table of all."""
